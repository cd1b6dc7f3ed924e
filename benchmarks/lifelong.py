"""The tables of docs/lifelong.md, made of docs/lifelong.json, which examples/lifelong.py writes.

python -m benchmarks.lifelong
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import filled, table
from easyedit_moe.storage.files import write_text
from easyedit_moe.storage.strict_json import read_json

ROOT = Path(__file__).parents[1]
CURVES = ROOT / "docs" / "lifelong.json"
PAGE = ROOT / "docs" / "lifelong.md"
FIRST = 100
"""Edits at which a run's utility is what its later ones are held against."""
NEAR = 5.0
"""Points of utility that may be lost."""

UNSEEN = "specificity, not in the statistics"
USUAL = {"batch_size": 100, "seed": 0, "passes": 1, "names": 0}
"""Options of the example where a run's command does not name them."""
LONG = 2000
"""Edits of a run from which on its whole course is shown."""
GOAL = 10000
"""Edits at which it is asked."""

Run = Mapping[str, Any]
Point = Mapping[str, Any]


def updated(text: str, content: Mapping[str, Any]) -> str:
    """The page with each table made anew, between the comments that name it."""
    runs: Mapping[str, Run] = content["runs"]
    tables = {
        "goal": goal_table(runs), "verdict": verdict_text(*longest(runs)), "last": last_table(runs),
        "course": "\n\n".join(course_table(*one) for one in runs.items() if one[1]["points"][-1]["edits"] >= LONG),
        "shared": shared_line(content["first batch"]), "capacity": capacity_table(runs),
        "tuning": tuning_table(content["tuning"]), "protected": protected_table(content["protected"]),
        "settings": settings_table(runs), "language": language_table(content["language model"]),
    }  # fmt: skip
    return filled(text, tables)


def shared_line(found: Mapping[str, Any]) -> str:
    """What edits reach that share their token with another of the batch."""
    return (
        f"Of the first {found['edits']} edits of Global with its settings for one batch, the {found['alone']} that "
        f"were alone at their token reached {found['alone, reached']:.1f} %, the {found['together']} others "
        f"{found['together, reached']:.1f} %."
    )


def goal_table(runs: Mapping[str, Run]) -> str:
    """Per run, how far it went and what was lost on the way."""
    rows = []
    for label, run in runs.items():
        first, last = point_at(run, FIRST), run["points"][-1]
        change = last["utility"] - first["utility"]
        slower = [slowing(run), slowing(run, last["edits"] / 2)]
        larger = last["resident bytes"] / first["resident bytes"]
        rows.append(
            [
                label, str(last["edits"]), f"{first['utility']:.1f}", f"{last['utility']:.1f}", f"{change:+.1f}",
                verdict(-change <= NEAR, last["edits"]), *("-" if one is None else f"{one:.2f}" for one in slower),
                f"{larger:.2f}",
            ]
        )  # fmt: skip
    names = (
        "run",
        "edits",
        f"utility at {FIRST}",
        "at the end",
        "change",
        "within 5",
        "seconds, times",
        "in its second half",
        "memory, times",
    )
    return table(names, rows)


def verdict(met: bool, edits: int) -> str:
    """Yes or no; of a run that stopped before, how it is so far."""
    return ("yes" if edits >= GOAL else "so far") if met else "no"


def slowing(run: Run, start: float = 0) -> float | None:
    """Seconds per edit at the last point that knows them, by those at the first one after so many edits; None where
    fewer than two do.
    """
    points = [one for one in run["points"] if one["edits"] >= start]
    known = [one["seconds per edit"] for one in points if one["seconds per edit"] is not None]
    return known[-1] / known[0] if len(known) > 1 else None


def verdict_text(label: str, run: Run) -> str:
    """What the longest run says of the goal."""
    first, last = point_at(run, FIRST), run["points"][-1]
    lost, edits = first["utility"] - last["utility"], last["edits"]
    parts = [f"{label}, the longest run, made {edits} edits" + (", not 10 000." if edits < GOAL else ".")]
    if lost > NEAR:
        last_near = max(p["edits"] for p in run["points"] if p["edits"] and first["utility"] - p["utility"] <= NEAR)
        parts.append(
            f"The goal is not met: utility falls by {lost:.1f} points, {lost - NEAR:.1f} more than it may, and is "
            f"within {NEAR:.0f} points up to {last_near} edits only."
        )
    else:
        parts.append(f"Its utility changed by {-lost:+.1f} points, within the {NEAR:.0f} of the goal.")
    sizes = [point["resident bytes"] / 2**20 for point in run["points"] if point["edits"] >= FIRST]
    parts.append(f"Resident memory lies between {min(sizes):.0f} and {max(sizes):.0f} MiB.")
    return " ".join(parts)


def measured_at(run: Run) -> set[int]:
    """After how many edits there are points."""
    return {point["edits"] for point in run["points"]}


def point_at(run: Run, edits: int) -> Point:
    """The point after so many edits."""
    return next(point for point in run["points"] if point["edits"] == edits)


def longest(runs: Mapping[str, Run]) -> tuple[str, Run]:
    """The run with the most edits, and its label."""
    return max(runs.items(), key=lambda item: item[1]["points"][-1]["edits"])


SHOWN = (
    "utility", "efficacy, all so far", "efficacy, since the last point", "retention, first, never superseded",
    "specificity, never edited", "perplexity",
)  # fmt: skip


def last_table(runs: Mapping[str, Run]) -> str:
    """Runs beside each other after as many edits, where several made them."""
    parts = []
    for edits in BESIDE:
        there = {label: run for label, run in runs.items() if edits in measured_at(run)}
        if len(there) > 1:
            rows = [[label, *measured(point_at(run, edits))] for label, run in there.items()]
            parts += [f"After {edits} edits:", table(("run", *COLUMNS), rows)]
    return "\n\n".join(parts)


BESIDE = (100, 200, 500, 1000)
COLUMNS = ("utility", "all so far", "newest", "retention", "specificity", "perplexity", "norm, times", "s per edit")


def measured(point: Point) -> list[str]:
    """The figures of a point, as `COLUMNS` names them."""
    found = [f"{point[name]:.1f}" if point[name] is not None else "-" for name in SHOWN]
    seconds = point["seconds per edit"]
    growth = max(point["norm growth per layer"].values())
    return [*found, f"{growth:.1f}", "-" if seconds is None else f"{seconds:.2f}"]


def course_table(label: str, run: Run) -> str:
    """One run at steps that grow."""
    end = run["points"][-1]["edits"]
    known = measured_at(run)
    steps = [n for n in (100, 500, 1000, 1500, 2000, 2500, 3000, 4000, 5000, 7000, 8500) if n < end and n in known]
    rows = []
    for edits in (*steps, end):
        point = point_at(run, edits)
        rows.append([str(edits), *measured(point), f"{point['resident bytes'] / 2**20:.0f}"])
    return f"{label}:\n\n" + table(("edits", *COLUMNS, "MiB"), rows)


def language_table(runs: Mapping[str, Run]) -> str:
    """All points of the runs on another model's records; perplexity in units of that before the first edit."""
    rows = []
    for label, run in runs.items():
        unedited = run["points"][0]["perplexity"]
        for point in run["points"]:
            if point["edits"] >= FIRST:
                cells = measured(point)
                cells[COLUMNS.index("perplexity")] = f"{point['perplexity'] / unedited:.2f}"
                cells[COLUMNS.index("norm, times")] = f"{max(point['norm growth per layer'].values()):.2f}"
                rows.append([label, str(point["edits"]), *cells, f"{point['resident bytes'] / 2**20:.0f}"])
    columns = ["perplexity, times" if name == "perplexity" else name for name in COLUMNS]
    return table(("run", "edits", *columns, "MiB"), rows)


def capacity_table(runs: Mapping[str, Run]) -> str:
    """Directions and keys per expert at the end of each run that solves, by layer."""
    rows = []
    for label, run in runs.items():
        for layer, found in run["points"][-1]["capacity"].items():
            numbers = [f"{found[name]:.1f}" for name in ("directions", "keys", "taken")]
            rows.append([label, str(run["points"][-1]["edits"]), layer, *numbers])
    return table(("run", "edits", "layer", "directions", "keys", "taken"), rows)


def tuning_table(found: Sequence[Mapping[str, Any]]) -> str:
    """What was tried on the other stream."""
    rows = [
        [
            one["settings"],
            str(one["edits"]),
            f"{one['efficacy']:.1f}",
            f"{one['specificity']:.1f}",
            f"{one['norm']:.1f}",
        ]
        for one in found
    ]
    return table(("settings", "edits", "all so far", "specificity", "norm, times"), rows)


def protected_table(runs: Mapping[str, Run]) -> str:
    """What becomes of people who are never edited, by what the statistics have of them."""
    rows = []
    for run in runs.values():
        names, strangers = run["settings"]["names"], run["settings"]["strangers"]
        last = run["points"][-1]
        shares = [f"{last[name]:.1f}" for name in ("efficacy, all so far", "specificity, never edited", UNSEEN)]
        rows.append([f"texts, and names {names} times" if names else "texts", str(last["edits"]), *shares])
        rows[-1][-1] += f" ({strangers} people)"
    return table(("statistics of", "edits", "all so far", "people in the statistics", "others"), rows)


def settings_table(runs: Mapping[str, Run]) -> str:
    """What each run was started with, beside `hparams/<METHOD>/factworld.yaml`."""
    rows = []
    for label, run in runs.items():
        settings = run["settings"]
        changes = ", ".join(f"`{name}={value}`" for name, value in settings["set"].items())
        given = {name: settings.get(name, usual) for name, usual in USUAL.items()}
        changes += "".join(
            f", `--{name.replace('_', '-')} {value}`" for name, value in given.items() if value != USUAL[name]
        )
        rows.append([label, settings["method"], changes])
    return table(("run", "method", "beside its YAML"), rows)


def main() -> None:
    write_text(PAGE, updated(PAGE.read_text(encoding="utf-8"), read_json(CURVES)))


if __name__ == "__main__":
    main()
