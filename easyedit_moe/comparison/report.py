"""A comparison as a table on the terminal, a Markdown table, results.json and a chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from rich import box
from rich.table import Table

from easyedit_moe.comparison.compare import Comparison
from easyedit_moe.comparison.differences import MEANING, differences, said
from easyedit_moe.comparison.rows import SCORES, Row
from easyedit_moe.comparison.saved import save_rows
from easyedit_moe.evaluation.summary import Score, legend, shown
from easyedit_moe.facts.records import PROTOCOLS
from easyedit_moe.host.baseline_hparams import PROTOCOL
from easyedit_moe.storage.figures import save_figure
from easyedit_moe.storage.files import check_writable, make_folder, write_text

COLUMNS = (
    "method", "code", "edits", "protocol", "efficacy", "generalisation", "specificity", "utility",
    "differs from the best", "routing (kept)", "targets s", "solve s", "write s", "peak MiB",
)  # fmt: skip


def cells(row: Row, differs: str = "-") -> list[str]:
    """One line of the table, as text; scores as mean and interval in percent (see `legend`)."""
    scores, seconds = row.scores, row.seconds
    preserved = row.routing["preservation"]["mean"]
    return [
        row.method if not row.seeds else f"{row.method}, {len(row.seeds)} seeds",
        row.code,
        row.edits,
        scores.protocol,
        shown(scores.efficacy),
        shown(scores.generalisation),
        shown(scores.specificity),
        shown(scores.utility),
        differs,
        f"{preserved:.1f}",
        f"{seconds['targets']:.1f}",
        f"{seconds['solve']:.2f}",
        f"{seconds['write']:.2f}",
        f"{row.peak_memory_bytes / 2**20:.0f}",
    ]


EASYEDIT_COLUMNS = ("method", "code", "rewrite_acc", "rephrase_acc", "locality_acc", "portability_acc")


def easyedit_cells(row: Row) -> list[str]:
    """One line of the table of EasyEdit's metrics, of a row that has them."""
    scores = cast(dict[str, Score], row.easyedit)
    return [row.method, row.code, *(shown(scores[name]) for name in EASYEDIT_COLUMNS[2:])]


def tables(comparison: Comparison) -> list[Table]:
    """The tables for a terminal: the papers' protocol, and EasyEdit's where it was measured."""
    provenance = comparison.provenance
    of = f"{provenance['edits']} {provenance['protocol']} edits in batches of {provenance['batch_size']} on "
    of += f"{provenance['model']}, scored after all of them, percent"
    out = [_table(f"{of}; by the papers' protocol: {PROTOCOLS[provenance['protocol']]}", COLUMNS, 4)]
    for line in _lines(comparison):
        out[0].add_row(*line)
    measured = [row for row in comparison.rows if row.easyedit is not None]
    if measured:
        out.append(_table(f"The same edits by the protocol of {PROTOCOL}", EASYEDIT_COLUMNS, 2))
        for row in measured:
            out[1].add_row(*easyedit_cells(row))
    return out


def _table(title: str, columns: Sequence[str], texts: int) -> Table:
    out = Table(box=box.SIMPLE_HEAD, title=title)
    for i, name in enumerate(columns):
        out.add_column(name, justify="left" if i < texts else "right", no_wrap=True)
    return out


def _lines(comparison: Comparison) -> list[list[str]]:
    found = differences(comparison.rows)
    return [cells(row, said(one)) for row, one in zip(comparison.rows, found, strict=True)]


def notes(comparison: Comparison) -> list[str]:
    """What intervals and tests are, for below the tables."""
    rows = comparison.rows
    scores = [getattr(row.scores, name) for row in rows for name in SCORES]
    theirs = [score for row in rows for score in (row.easyedit or {}).values()]
    compared = any(differences(rows))
    return [text for text in (legend([*scores, *theirs]), MEANING if compared else "") if text]


def markdown(comparison: Comparison) -> str:
    """The same tables for a README."""
    text = markdown_rows(COLUMNS, 4, _lines(comparison))
    measured = [row for row in comparison.rows if row.easyedit is not None]
    if measured:
        text += f"\nThe same edits by the protocol of {PROTOCOL}:\n\n"
        text += markdown_rows(EASYEDIT_COLUMNS, 2, [easyedit_cells(row) for row in measured])
    return "\n".join([text, *(f"{line}\n" for line in notes(comparison))])


def markdown_rows(columns: Sequence[str], texts: int, rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first ``texts`` columns hold texts, the others numbers."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * texts + "---:|" * (len(columns) - texts)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def check_folder(out: str | Path) -> Path:
    """The folder for results, made if need be.

    Raises:
        WriteError: it can't be made or written to.
    """
    folder = make_folder(out)
    check_writable(folder / "results.json")
    return folder


def write_results(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``results.json``, ``table.md`` and ``comparison.png``; each in full or not at all."""
    paths = [save_rows(comparison, folder), write_text(folder / "table.md", markdown(comparison))]
    chart(comparison, folder / "comparison.png")
    return [*paths, folder / "comparison.png"]


def _reach(score: Score) -> tuple[float, float]:
    """How far the interval lies below and above the mean; without one, the standard error."""
    if score.low is None or score.high is None:
        return score.stderr, score.stderr
    return max(0.0, score.mean - score.low), max(0.0, score.high - score.mean)


def chart(comparison: Comparison, path: Path) -> None:
    """Efficacy, generalisation and specificity as bars with intervals, and seconds per stage beside them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = comparison.rows
    names = [row.method for row in rows]
    figure, (scores, times) = plt.subplots(
        1, 2, figsize=(13, 0.55 * len(rows) + 2.2), width_ratios=(3, 2), sharey=True, layout="constrained"
    )
    for k, (name, colour) in enumerate(
        (("efficacy", "#1b6ca8"), ("generalisation", "#e08e45"), ("specificity", "#4a9d5b"))
    ):
        values = [getattr(row.scores, name) for row in rows]
        scores.barh(
            [i + (k - 1) * 0.26 for i in range(len(rows))],
            [v.mean for v in values],
            height=0.24,
            xerr=list(zip(*(_reach(v) for v in values), strict=True)),
            color=colour,
            label=name,
            error_kw={"elinewidth": 1, "ecolor": "#333333"},
        )
    scores.set(xlim=(0, 104), xlabel=f"percent (mean and 95 % interval), protocol {comparison.provenance['protocol']}")
    scores.set_yticks(range(len(rows)), names)
    scores.invert_yaxis()
    scores.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3, frameon=False)
    left = [0.0] * len(rows)
    for stage, colour in (("targets", "#9db8d2"), ("solve", "#b5446e"), ("write", "#f0c05a")):
        values = [row.seconds[stage] for row in rows]
        times.barh(range(len(rows)), values, left=left, color=colour, label=stage, height=0.6)
        left = [a + b for a, b in zip(left, values, strict=True)]
    times.set(xlabel="seconds for all edits")
    times.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3, frameon=False)
    for axis in (scores, times):
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
