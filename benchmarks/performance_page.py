"""The tables of docs/performance.md that are made of benchmarks/results/: python -m benchmarks.performance_page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.endurance import first_and_last
from benchmarks.held import GROWING
from benchmarks.pages import filled, table
from benchmarks.peak import AT_FULL, BY_PLAN, MEASURED
from easyedit_moe.storage.files import write_text
from easyedit_moe.storage.strict_json import read_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
NEAR = 0.15
"""How far a plan may be from what is measured."""
SOLVING = ("statistics", "metric", "basis", "targets", "capture", "solve", "write", "whole edit")
TRAINING = ("targets", "attach", "originals", "train", "write", "answers", "whole edit")

Rows = list[dict[str, Any]]


def newest_suites(folder: Path) -> dict[str, Any]:
    """Of each suite the rows that were made last, on whatever machine; reduced runs are left out."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        for name, suite in {} if content["quick"] else content["suites"].items():
            if name not in found or _made(suite) >= _made(found[name]):
                found[name] = suite
    return found


def _made(suite: Mapping[str, Any]) -> tuple[str, bool]:
    source = suite.get("source", {})
    return source.get("date", ""), bool(source.get("commit"))


def updated(text: str, suites: Mapping[str, Any]) -> str:
    """The page with each part made anew."""
    plans, growth, endurance = (suites[name]["rows"] for name in ("plan", "growth", "endurance"))
    parts = {
        "rows": source_table(suites), "plan figures": plan_sentence(plans) + _older(suites["plan"]),
        "plans of solvers": plan_table(plans, SOLVING, solving=True),
        "plans of training": plan_table(plans, TRAINING, solving=False), "edits made": made_table(growth),
        "first and last edits": edits_table(endurance), "peak": peak_tables(suites.get("peak", {"rows": []})["rows"]),
        "versions": versions_table(suites["versions"]["rows"]),
    }  # fmt: skip
    return filled(text, parts)


def source_table(suites: Mapping[str, Any]) -> str:
    """Per suite, by which code its rows were made."""
    cells = []
    for name, suite in sorted(suites.items()):
        source, about = suite.get("source", {}), suite["machine"]
        version = source.get("easyedit_moe", about["easyedit_moe"])
        date = source.get("date", "not recorded")
        machine = f"{about['cpu']}, {about['cores']} cores"
        cells.append([name, version, _commit(source), date, machine, _peaks(name, suite), str(about["threads"])])
    return table(("suite", "version", "commit", "date", "machine", "peaks", "threads"), cells, 6)


def _peaks(name: str, suite: Mapping[str, Any]) -> str:
    """How peaks of memory were measured: rows that know their commit, and the plan's always, count blocks."""
    if not any("peak" in key or key == "measured bytes" for row in suite["rows"] for key in row):
        return "none"
    return "blocks" if name == "plan" or suite.get("source", {}).get("commit") else "resident memory"


def _commit(source: Mapping[str, Any]) -> str:
    if source.get("commit"):
        return f"{source['commit'][:7]}{', with changes' if source.get('changed') else ''}"
    if "committed with" in source:
        return f"not recorded; committed with {source['committed with']}"
    return "not recorded"


def plan_sentence(rows: Rows) -> str:
    """How many figures there are, how many of them are near, and by name those that are not."""
    far = sorted((row for row in rows if not _near(row)), key=lambda row: (row["method"], row["stage"]))
    told = "All" if not far else f"{len(rows) - len(far)} of"
    sentence = f"{told} {len(rows)} figures are within {NEAR:.0%}".replace("%", " %")
    if not far:
        return sentence + "."
    names: dict[str, list[str]] = {}
    for row in far:
        names.setdefault(f"{row['method']}'s {row['stage']}", []).append(f"{_ratio(row)} ({row['size']})")
    return f"{sentence}; the others are {'; '.join(f'{name} ' + ', '.join(found) for name, found in names.items())}."


def _older(suite: Mapping[str, Any]) -> str:
    """What is to be said of rows that do not know their commit."""
    if suite.get("source", {}).get("commit"):
        return ""
    return (
        "\nPlans and the suite were changed after these rows were made; the suite has not been run at all sizes since."
    )


def _near(row: Mapping[str, Any]) -> bool:
    found = row["planned / measured"]
    return found is not None and abs(found - 1) <= NEAR


def _ratio(row: Mapping[str, Any]) -> str:
    found = row["planned / measured"]
    return "-" if found is None else f"{found:.2f}"


def plan_table(rows: Rows, stages: tuple[str, ...], solving: bool) -> str:
    """Planned over measured bytes, the sizes side by side, of the methods that solve or of those that train.

    Raises:
        ValueError: a row's stage has no column.
    """
    solvers = {row["method"] for row in rows if row["stage"] == "solve"}
    mine = [row for row in rows if (row["method"] in solvers) == solving]
    unknown = sorted({row["stage"] for row in mine} - set(stages))
    if unknown:
        raise ValueError(f"The plan's table has no column for {', '.join(unknown)}; add it.")
    cells = [
        [
            method,
            *(
                " ".join(_ratio(row) for row in mine if (row["method"], row["stage"]) == (method, stage))
                for stage in stages
            ),
        ]
        for method in dict.fromkeys(row["method"] for row in mine)
    ]
    return table(("", *stages), cells, 1 + len(stages))


def made_table(rows: Rows) -> str:
    """Seconds and MiB of a batch beside edits that were made before, in both ways where they were measured."""
    mine = [row for row in rows if row["benchmark"] == "growth with edits made"]
    counts = list(dict.fromkeys(row["made before"] for row in mine))
    cells: dict[tuple[str, str, str], list[str]] = {}
    for row in mine:
        who = (row["what"], row.get("metric", "identity"), row.get("way", GROWING))
        cells.setdefault(who, []).append(f"{row['seconds']:.3g} s, {row['peak bytes'] / 2**20:.0f} MiB")
    heads = ("solver", "metric", "way", *(f"{count} before" for count in counts))
    return table(heads, [[*who, *found] for who, found in cells.items()], 3)


def edits_table(rows: Rows) -> str:
    """Seconds of an edit in the first and the last part of a run, and resident memory after both."""
    mine = [{"remember_edits": False, **row} for row in rows if row["benchmark"] == "edits one by one"]
    cells = []
    for row in first_and_last(mine):
        undone = [
            one["as before"]
            for one in mine
            if not one["made"] and (one["what"], one["remember_edits"]) == (row["what"], row["remember_edits"])
        ]
        first, last = row["seconds of the first"], row["seconds of the last"]
        memory = [row[f"resident bytes after the {which}"] / 1e6 for which in ("first", "last")]
        cells.append(
            [
                row["what"], "yes" if row["remember_edits"] else "no", f"{first:.3f} (1 to {row['part']})",
                f"{last:.3f} (to {row['edits']})", f"{row['last / first']:.2f}", f"{memory[0]:.0f}", f"{memory[1]:.0f}",
                "yes" if undone == [True] else "no",
            ]
        )  # fmt: skip
    heads = (
        "method", "`remember_edits`", "s an edit, first", "last", "last / first", "resident MB after the first",
        "after the last", "undone to the bit",
    )  # fmt: skip
    return table(heads, cells, 2)


def peak_tables(rows: Rows) -> str:
    """What the plan says of every method, and what was measured of some."""
    if not rows:
        return "The suite was not run at size yet."
    by = {name: [row for row in rows if row["benchmark"] == name] for name in (BY_PLAN, MEASURED, AT_FULL)}
    heads = ("by plan", "largest stage", "peak / model", "z ready, edits alone", "within the room", "with targets in")
    plans = [
        [
            row["method"], row["largest stage"], f"{row['peak / model']:.3f}",
            f"{row['z ready, edits alone / model']:.3f}",
            f"{row['within the room / model']:.3f}" if row["fits"] else "does not fit",
            "" if row["target_batch_size"] is None else f"{row['target_batch_size']} sequences",
        ]
        for row in by[BY_PLAN]
    ]  # fmt: skip
    columns = ("measured", "widths / layers", "model MB", "beyond it, MB", "peak / model", "of 48 such layers")
    found = [
        [
            row["method"], f"1/{row['widths divided by']} / {row['layers']}", f"{row['model bytes'] / 1e6:.0f}",
            f"{row['beyond the model'] / 1e6:.1f}", f"{row['peak / model']:.3f}",
            f"{row['peak / model of 48 layers']:.3f}",
        ]
        for row in by[MEASURED]
    ]  # fmt: skip
    ends = (
        "at full width", "largest", "fixed, GB", "by the widths, GB", "by their square, GB", "peak / model",
        "editing / model",
    )  # fmt: skip
    parts = ("fixed bytes", "bytes by the widths", "bytes by their square")
    most = [
        [
            row["method"], row["largest"], *(f"{row[part] / 1e9:.2f}" for part in parts),
            f"{row['peak / model']:.3f}", f"{row['editing / model']:.3f}",
        ]
        for row in by[AT_FULL]
    ]  # fmt: skip
    return "\n\n".join([table(heads, plans, 2), table(columns, found, 2), table(ends, most, 2)])


FIGURES = {
    "prepare, cached": "prepare, cached", "a batch with its search of targets": "a batch with its search",
    "batches, z ready": "all batches", "last batch": "the last one", "single edits, z ready": "single edits",
    "resident after the last": "resident, MB",
}  # fmt: skip
"""Figures of two versions, and what their columns are called."""


def versions_table(rows: Rows) -> str:
    """Of each method, what an earlier version took and what this one does."""
    found: dict[tuple[str, bool], dict[str, str]] = {}
    for row in rows:
        share = 1e-6 if row["unit"] == "bytes" else 1
        both = [f"{value * share:.0f}" if share < 1 else f"{value:.3g}" for value in _both(row)]
        cells = found.setdefault((row["method"], row["remember_edits"]), {})
        cells[row["figure"]] = f"{' / '.join(both)} = {row['before / this']:.2f}"
    cells = [
        [method, "yes" if remember else "no", *(figures[name] for name in FIGURES)]
        for (method, remember), figures in found.items()
    ]
    return table(("method", "`remember_edits`", *FIGURES.values()), cells, 2)


def _both(row: Mapping[str, Any]) -> tuple[float, float]:
    return row["before's"], row["this one's"]


def main() -> None:
    """Make the page again."""
    write_text(PAGE, updated(PAGE.read_text(encoding="utf-8"), newest_suites(RESULTS)))


if __name__ == "__main__":
    main()
