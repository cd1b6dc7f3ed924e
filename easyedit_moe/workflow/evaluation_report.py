"""An evaluation as a table and as files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from easyedit_moe.comparison.report import check_folder
from easyedit_moe.evaluation.summary import Summary, legend, shown
from easyedit_moe.storage.files import write_text
from easyedit_moe.storage.strict_json import json_text
from easyedit_moe.workflow.evaluate import RECORDS, Evaluation, Measure

COLUMNS = ("measured", "protocol", "score", "before", "after", "change", "p", "n")
TEXTS = 3
"""Columns of texts, which come first."""


def cells(measure: Measure) -> list[str]:
    """One line of the table, as text; means with intervals, and the p of the change (see `notes`)."""
    digits = 1 if measure.group == RECORDS else 4
    after = measure.after
    change = "-" if after is None else f"{after.mean - measure.before.mean:+.{digits}f}"
    texts = [measure.group, measure.protocol, measure.name]
    values = ["-" if value is None else _shown(value, digits) for value in (measure.before, after)]
    p = "-" if measure.change is None else f"{measure.change.p:.2g}"
    return [*texts, *values, change, p, str(measure.before.count)]


def _shown(value: Summary, digits: int) -> str:
    """As `shown`, but a mean over no example is told as such, too."""
    return shown(value, digits) if value.count else shown(replace(value, count=1), digits)


def notes(result: Evaluation) -> list[str]:
    """What intervals and p are, for below the table."""
    values = [value for measure in result.measures for value in (measure.before, measure.after) if value is not None]
    tests = list(dict.fromkeys(measure.change.test for measure in result.measures if measure.change is not None))
    told = f"p: of the change, record by record, two-sided ({'; '.join(tests)})." if tests else ""
    return [text for text in (legend(values), told) if text]


def markdown(result: Evaluation) -> str:
    """The table for a report."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * TEXTS + "---:|" * (len(COLUMNS) - TEXTS)]
    lines += ["| " + " | ".join(cells(measure)) + " |" for measure in result.measures]
    return "\n".join(["\n".join(lines) + "\n", *(f"{line}\n" for line in notes(result))])


def write_evaluation(result: Evaluation, out: str | Path) -> list[Path]:
    """Write ``results.json`` and ``table.md`` into a folder, which is made if need be; each in full or not at all.

    Raises:
        WriteError: the folder can't be made or written to.
    """
    folder = check_folder(out)
    text = json_text(result.to_dict())
    paths = [folder / "results.json", folder / "table.md"]
    for path, content in zip(paths, (text, markdown(result)), strict=True):
        write_text(path, content)
    return paths
