"""Tables and figures in README and docs that are made from committed results: ``python -m benchmarks.result_pages``.

A page says where one belongs by a line ``<!-- made from FILE: KIND -->``; what stands there is replaced up to the next
``<!-- end -->``. ``FILE`` lies in ``docs``; kinds are the functions of `KINDS` and `READ`, and a method's
name for its figures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from easyedit_moe.comparison import paper_report
from easyedit_moe.comparison.compare import Comparison
from easyedit_moe.comparison.report import markdown, markdown_rows
from easyedit_moe.comparison.rows import PRE_EDIT, Row
from easyedit_moe.comparison.saved import read_results
from easyedit_moe.comparison.settings import DEFAULT_METHODS
from easyedit_moe.evaluation.summary import Summary, legend, shown
from easyedit_moe.hparams import SolverHyperParams, hyperparams_class
from easyedit_moe.storage.files import write_text
from easyedit_moe.storage.strict_json import read_json

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- made from (\S+): ([^\n]+?) -->\n)(.*?)(<!-- end -->)", re.S)
SCORES = ("efficacy", "generalisation", "specificity", "utility")


def scores(comparison: Comparison) -> str:
    """The four scores of every row but the unedited one."""
    rows = [row for row in comparison.rows if row.method != PRE_EDIT]
    cells = [[row.method, *(shown(getattr(row.scores, name)) for name in SCORES)] for row in rows]
    return f"{markdown_rows(('variant', *SCORES), 1, cells)}\n{_legend(rows)}\n"


def short(comparison: Comparison) -> str:
    """Scores and seconds of the default methods, without the letters that say what kind an interval is of."""
    rows = [row for method in DEFAULT_METHODS for row in comparison.rows if row.method == method]
    seconds = ("targets", "solve", "write")
    cells = [
        [
            row.method,
            *(_bare(getattr(row.scores, name)) for name in SCORES),
            *(f"{row.seconds[name]:.1f}" for name in seconds),
        ]
        for row in rows
    ]
    return markdown_rows(("method", *SCORES, *(f"{name} s" for name in seconds)), 1, cells)


def host(comparison: Comparison) -> str:
    """Scores, seconds and memory of EasyEdit's own methods."""
    rows = [row for row in comparison.rows if row.code == "easyeditor"]
    cells = [
        [
            row.method,
            *(shown(getattr(row.scores, name)) for name in SCORES[:3]),
            f"{row.seconds['solve']:.1f}",
            f"{row.peak_memory_bytes / 2**20:.0f}",
        ]
        for row in rows
    ]
    return f"{markdown_rows(('method', *SCORES[:3], 'seconds', 'peak MiB'), 1, cells)}\n{_legend(rows)}\n"


def of_method(row: Row) -> str:
    """A method's scores and cost in a sentence."""
    found = ", ".join(f"{name} {shown(getattr(row.scores, name))}" for name in SCORES[:3])
    spent = {"statistics": "for statistics", "targets": "for targets", "solve": "to solve", "write": "to write"}
    if not issubclass(hyperparams_class(row.method), SolverHyperParams):
        spent["solve"] = "to train"
    times = [f"{row.seconds[name]:.2f} s {what}" for name, what in spent.items() if row.seconds[name]]
    memory = f"peak memory of the process {row.peak_memory_bytes / 2**20:.0f} MiB"
    about = _legend([row])
    return f"{found}, percent;\n{', '.join(times)}; {memory}.\n" + (f"{about}\n" if about else "")


def ability(content: Mapping[str, Any]) -> str:
    """General ability after the edits of each method: a column per score of a task, and the unedited model first."""
    runs: dict[str, list[dict[str, Any]]] = {name: one["measures"] for name, one in content["evaluations"].items()}
    first = next(iter(runs.values()))
    columns = ("edited by", *(f"{one['group']}: {one['name']}" for one in first))
    rows = [["nothing", *(_of_task(one["before"]) for one in first)]]
    rows += [[name, *(_of_task(one["after"]) for one in measures)] for name, measures in runs.items()]
    return markdown_rows(columns, 1, rows)


def _of_task(score: Mapping[str, Any]) -> str:
    return shown(Summary(**score), 3)


def tucker(content: Mapping[str, Any]) -> str:
    """Scores of every row of ``examples/tucker_ranks.py``, with ranks and relative error of the layers' bases."""
    cells = []
    for row in content["rows"]:
        if row["method"] == PRE_EDIT:
            continue
        bases = list(content["bases"][row["method"]].values())
        ranks = [_span([base["ranks"][mode] for base in bases], "d") for mode in range(3)]
        error = _span([base["relative_error"] for base in bases], ".2f")
        found = [row[name] for name in SCORES]
        scored = [f"{one['mean']:.1f} [{one['low']:.1f}, {one['high']:.1f}]" for one in found]
        cells.append([row["method"], ", ".join(ranks), error, *scored])
    return markdown_rows(("variant", "ranks", "error", *SCORES), 3, cells)


def _span(values: Sequence[float], form: str) -> str:
    """The least and the greatest of some values, or the one that all are."""
    ends = [format(value, form) for value in (min(values), max(values))]
    return "-".join(dict.fromkeys(ends))


READ: Mapping[str, Callable[[Mapping[str, Any]], str]] = {"ability": ability, "ranks": tucker}
"""Kinds that read a file that is no comparison alone."""

KINDS: Mapping[str, Callable[[Comparison], str]] = {
    "all": markdown, "table": paper_report.markdown, "scores": scores, "short": short, "host": host,
}  # fmt: skip


def made(page: str, docs: Path = ROOT / "docs") -> str:
    """A page with all that is made from results as the results now are.

    Raises:
        ValueError: a kind that is none, nor a row's name.
    """

    def block(found: re.Match[str]) -> str:
        head, name, kind, _, end = found.groups()
        if kind in READ:
            return f"{head}\n{READ[kind](read_json(docs / name))}\n{end}"
        comparison = read_results(docs / name)
        if kind in KINDS:
            return f"{head}\n{KINDS[kind](comparison)}\n{end}"
        for row in comparison.rows:
            if row.method == kind:
                return f"{head}{of_method(row)}{end}"
        raise ValueError(f"{kind!r} is none of {', '.join([*KINDS, *READ])}, nor a row of {name}.")

    return BLOCK.sub(block, page)


def pages() -> dict[Path, str]:
    """Pages that have such parts, with their text."""
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))}
    return {path: text for path, text in texts.items() if BLOCK.search(text)}


def _legend(rows: list[Row]) -> str:
    return legend([getattr(row.scores, name) for row in rows for name in SCORES])


def _bare(score: Summary) -> str:
    return shown(score).rpartition(" ")[0] if score.low is not None else shown(score)


def main() -> None:
    """Make them again."""
    for path, text in pages().items():
        write_text(path, made(text))


if __name__ == "__main__":
    typer.run(main)
