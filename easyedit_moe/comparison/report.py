"""A comparison as a table on the terminal, a Markdown table, results.json and a chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from easyedit_moe.comparison import retention
from easyedit_moe.comparison.compare import Comparison
from easyedit_moe.comparison.differences import MEANING, differences, said
from easyedit_moe.comparison.rows import SCORES, Row
from easyedit_moe.comparison.saved import save_rows
from easyedit_moe.errors import DataError
from easyedit_moe.evaluation.summary import Score, legend, shown
from easyedit_moe.facts.records import PROTOCOLS
from easyedit_moe.host.baseline_hparams import PROTOCOL
from easyedit_moe.storage.figures import save_figure
from easyedit_moe.storage.files import check_writable, path_of, write_text

COLUMNS = (
    "method", "code", "edits", "protocol", "efficacy", "generalisation", "specificity", "utility",
    "differs from the best", "routing (kept)", "targets s", "solve s", "write s", "peak MiB",
)  # fmt: skip


def cells(row: Row, differs: str = "-") -> list[str]:
    """One line of the table, as text; scores as mean and interval in percent (see `legend`)."""
    scores, seconds = row.scores, row.seconds
    kept = f"{row.routing['preservation']['mean']:.1f}" if row.routing else "-"
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
        kept,
        f"{seconds['targets']:.1f}",
        f"{seconds['solve']:.2f}",
        f"{seconds['write']:.2f}",
        f"{row.peak_memory_bytes / 2**20:.0f}",
    ]


EASYEDIT_COLUMNS = ("rewrite_acc", "rephrase_acc", "locality_acc", "portability_acc")
ANSWER_COLUMNS = ("exact", "contains", "judged", "rephrase_exact", "rephrase_contains", "rephrase_judged")


@dataclass(frozen=True)
class Further:
    """A table under the main one.

    Attributes:
        title: what it shows.
        columns: the first ``texts`` of which hold texts, the others numbers.
        texts: see ``columns``.
        lines: cells, row by row.
    """

    title: str
    columns: Sequence[str]
    texts: int
    lines: Sequence[Sequence[str]]


def further(comparison: Comparison) -> list[Further]:
    """Tables of what was measured besides: EasyEdit's metrics, real answers, retention."""
    theirs = [(row, row.easyedit) for row in comparison.rows if row.easyedit is not None]
    real = [(row, row.answers) for row in comparison.rows if row.answers is not None]
    kept = [
        line
        for row in comparison.rows
        if row.retention
        for line in retention.lines(row.method, row.retention, row.scores)
    ]
    return [
        *_of_scores(f"The same edits by the protocol of {PROTOCOL}", EASYEDIT_COLUMNS, theirs),
        *_of_scores(
            "Real answers: free generation from the bare prompt, all of it matched (WILD, arXiv 2502.11177); beside it "
            "efficacy and exact match by teacher forcing",
            ANSWER_COLUMNS,
            real,
            ("efficacy", "exact_match"),
        ),
        *([Further(RETENTION, retention.COLUMNS, 2, kept)] if kept else []),
    ]


RETENTION = (
    "Retention: each record right after the batch that edited it and after all edits; p of the paired test between both"
)


def _of_scores(
    title: str, columns: Sequence[str], rows: Sequence[tuple[Row, dict[str, Score]]], forced: Sequence[str] = ()
) -> list[Further]:
    used = [name for name in columns if any(name in scores for _, scores in rows)]
    cells = [
        [
            row.method, row.code, *(shown(getattr(row.scores, name)) for name in forced),
            *(shown(scores[name]) if name in scores else "-" for name in used),
        ]
        for row, scores in rows
    ]  # fmt: skip
    return [Further(title, ("method", "code", *forced, *used), 2, cells)] if rows else []


def tables(comparison: Comparison) -> list[Table]:
    """The tables for a terminal: the papers' protocol, and what else was measured."""
    provenance = comparison.provenance
    of = f"{provenance['edits']} {provenance['protocol']} edits in batches of {provenance['batch_size']} on "
    of += f"{provenance['model']}, scored after all of them, percent"
    main = f"{of}; by the papers' protocol: {PROTOCOLS[provenance['protocol']]}"
    out = []
    for one in [Further(main, COLUMNS, 4, lines(comparison)), *further(comparison)]:
        out.append(_table(one.title, one.columns, one.texts))
        for line in one.lines:
            out[-1].add_row(*line)
    return out


def _table(title: str, columns: Sequence[str], texts: int) -> Table:
    out = Table(box=box.SIMPLE_HEAD, title=title)
    for i, name in enumerate(columns):
        out.add_column(name, justify="left" if i < texts else "right", no_wrap=True)
    return out


def lines(comparison: Comparison) -> list[list[str]]:
    """The cells of every row, in the order of `COLUMNS`."""
    found = differences(comparison.rows)
    return [cells(row, said(one)) for row, one in zip(comparison.rows, found, strict=True)]


def notes(comparison: Comparison) -> list[str]:
    """What intervals and tests are, for below the tables."""
    rows = comparison.rows
    scores = [getattr(row.scores, name) for row in rows for name in SCORES]
    besides = [score for row in rows for found in (row.easyedit, row.answers) for score in (found or {}).values()]
    compared = any(differences(rows))
    return [text for text in (legend([*scores, *besides]), MEANING if compared else "") if text]


def markdown(comparison: Comparison) -> str:
    """The same tables for a README."""
    text = markdown_rows(COLUMNS, 4, lines(comparison))
    for one in further(comparison):
        text += f"\n{one.title}:\n\n" + markdown_rows(one.columns, one.texts, one.lines)
    return "\n".join([text, *(f"{line}\n" for line in notes(comparison))])


def markdown_rows(columns: Sequence[str], texts: int, rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first ``texts`` columns hold texts, the others numbers."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * texts + "---:|" * (len(columns) - texts)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def check_folder(out: str | Path) -> Path:
    """The folder for results, which is made when the first of them is written.

    Raises:
        DataError: no path. WriteError: it can't be made or written to.
    """
    folder = path_of(out, "the output folder", DataError)
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
