"""A table of the paper as text, Markdown and a chart, made from the comparison that its ``results.json`` holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from easyedit_moe.comparison import report
from easyedit_moe.comparison.compare import Comparison
from easyedit_moe.comparison.papers import COUNTERFACT, TABLES, PaperTable
from easyedit_moe.comparison.rows import PRE_EDIT, Row
from easyedit_moe.comparison.saved import RESULTS, read_results, save_rows
from easyedit_moe.evaluation.routing import NAMES as WINDOWS
from easyedit_moe.facts.records import PROTOCOLS
from easyedit_moe.storage.figures import save_figure
from easyedit_moe.storage.files import write_text

PROMPTS = ("edit", "preservation")
"""What routing is compared on: prompts that are edited, and those that are to stay as they are."""
SIMILARITY = (
    "mean Jaccard similarity of the routed expert sets before and after at the last token, by windows of layers"
)
PUBLISHED = ("efficacy", "generalisation", "specificity")
_LEFT = ("code", "edits", "spread", "protocol")


def about(table: PaperTable, comparison: Comparison) -> str:
    """What a table compares, on what, and how it was scored, in one line."""
    found = comparison.provenance
    scores = SIMILARITY if "routing" in table.columns else PROTOCOLS[found["protocol"]]
    text = (
        f"{table.heading}. {found['edits']} {found['protocol']} edits in batches of {found['batch_size']} on "
        f"{found['model']}, scored after all of them in percent: {scores}."
    )
    if table.ready_targets:
        text += " Targets of all records were found once, at the unedited weights, and given to every method."
    return text


def header(table: PaperTable, comparison: Comparison) -> list[str]:
    """Names of the columns; those of published figures only where there are some."""
    names = ["method"]
    for column in table.columns:
        names += _windows(comparison) if column == "routing" else [column]
    found = comparison.provenance.get("published")
    if found:
        names += [f"paper: {name}" for name in PUBLISHED] + [f"paper: s ({found['hardware']})"]
    return names


def lines(table: PaperTable, comparison: Comparison) -> list[list[str]]:
    """The cells of every row."""
    found = (comparison.provenance.get("published") or {}).get("figures")
    out = []
    for row, line in zip(comparison.rows, report.lines(comparison), strict=True):
        known = {**dict(zip(report.COLUMNS, line, strict=True)), **_more(row)}
        cells = [known["method"]]
        for column in table.columns:
            cells += _routing(row) if column == "routing" else [known[column]]
        out.append(cells if found is None else [*cells, *_published(found.get(row.method))])
    return out


def _more(row: Row) -> dict[str, str]:
    """Cells that other comparisons do without."""
    seconds = row.seconds
    total = seconds["solve"] + seconds["write"]
    return {
        "spread": str(row.hparams.get("spread", "-")),
        "statistics s": f"{seconds['statistics']:.1f}",
        "total s": f"{total:.2f}",
    }


def _published(figures: Mapping[str, float] | None) -> list[str]:
    if figures is None:
        return ["-"] * (len(PUBLISHED) + 1)
    return [*(f"{figures[name]:.2f}" for name in PUBLISHED), f"{figures['seconds']:.1f}"]


def _windows(comparison: Comparison) -> list[str]:
    """Columns of both sets of prompts: each window with its layers, where the rows say which (schema 2), and all."""
    found = comparison.rows[0].routing[PROMPTS[0]].get("windows") if comparison.rows else None
    names = ["{} {}-{}".format(name, *found[name]) for name in WINDOWS] if found else WINDOWS
    return [f"{prompts}, {name}" for prompts in PROMPTS for name in (*names, "all layers")]


def _routing(row: Row) -> list[str]:
    values = [row.routing[prompts][name] for prompts in PROMPTS for name in (*WINDOWS, "mean")]
    return ["-" if value is None or math.isnan(value) else f"{value:.1f}" for value in values]


def markdown(comparison: Comparison) -> str:
    """The table that a comparison was made for, under a line that says of what, with what was left out below."""
    table = TABLES[comparison.provenance["table"]]
    names = header(table, comparison)
    text = f"{about(table, comparison)}\n\n" + report.markdown_rows(names, _texts(names), lines(table, comparison))
    return text + "".join(f"\n{note}\n" for note in notes(table, comparison))


def notes(table: PaperTable, comparison: Comparison) -> list[str]:
    """What was left out, and what numbers of the table mean, for below it."""
    found = [f"Left out: {line}" for line in comparison.provenance.get("left_out", [])]
    if "efficacy" in table.columns:
        found += report.notes(comparison)
    if comparison.provenance.get("published"):
        found.append("Published: arXiv 2605.16686; its seconds are not of this machine.")
    return found


def _texts(names: Sequence[str]) -> int:
    """How many columns from the left hold texts."""
    return next((number for number, name in enumerate(names) if number and name not in _LEFT), len(names))


def folder_of(table: PaperTable, data: str, out: Path) -> Path:
    """Where a table on one data set lies under the folder of all tables."""
    return out / "-".join(["table", table.name, *([] if data == COUNTERFACT else [data])])


def write_overview(out: Path) -> Path:
    """Write ``tables.md``: all tables in a folder that have all of their rows, in the paper's order."""
    places = [folder_of(table, data, out) / RESULTS for table in TABLES.values() for data in table.data]
    found = [read_results(place) for place in places if place.is_file()]
    return write_text(out / "tables.md", "\n".join(markdown(one) for one in found if one.complete))


def write_table(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``results.json``, ``table.md`` and a chart; each in full or not at all."""
    table = TABLES[comparison.provenance["table"]]
    path = folder / "table.md"
    paths = [save_rows(comparison, folder), path, folder / "comparison.png"]
    write_text(path, markdown(comparison))
    chart = routing_chart if "routing" in table.columns else report.chart
    chart(comparison, paths[-1])
    return paths


def routing_chart(comparison: Comparison, path: Path) -> None:
    """Routing similarity by layer, a line for each method, on both sets of prompts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    edited = [row for row in comparison.rows if row.method != PRE_EDIT]
    figure, axes = plt.subplots(1, len(PROMPTS), figsize=(15, 4.5), sharey=True, layout="constrained")
    for axis, prompts in zip(axes, PROMPTS, strict=True):
        for number, row in enumerate(edited):
            found = row.routing[prompts]["per_layer"]
            colour = plt.get_cmap("tab20")(number % 20)
            axis.plot(list(found), list(found.values()), marker=".", color=colour, label=row.method)
        axis.set(title=f"{prompts} prompts", xlabel="layer", ylim=(0, 104))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("Jaccard similarity of the routed experts, percent")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    save_figure(figure, path)
