"""An evaluation as a table and as files."""

from __future__ import annotations

import json
from pathlib import Path

from easyedit_moe.comparison.report import check_folder
from easyedit_moe.storage.files import replacing
from easyedit_moe.workflow.evaluate import RECORDS, Evaluation, Measure, Value

COLUMNS = ("measured", "protocol", "score", "before", "after", "change", "n")


def cells(measure: Measure) -> list[str]:
    """One line of the table, as text; means ± standard errors."""
    digits = 1 if measure.group == RECORDS else 4
    after = measure.after
    change = "-" if after is None else f"{after.mean - measure.before.mean:+.{digits}f}"
    shown = "-" if after is None else _shown(after, digits)
    return [
        measure.group,
        measure.protocol,
        measure.name,
        _shown(measure.before, digits),
        shown,
        change,
        str(measure.before.count),
    ]


def _shown(value: Value, digits: int) -> str:
    error = "" if value.stderr is None else f" ± {value.stderr:.{digits}f}"
    return f"{value.mean:.{digits}f}{error}"


def markdown(result: Evaluation) -> str:
    """The table for a report."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|---|" + "---:|" * (len(COLUMNS) - 3)]
    lines += ["| " + " | ".join(cells(measure)) + " |" for measure in result.measures]
    return "\n".join(lines) + "\n"


def write_evaluation(result: Evaluation, out: str | Path) -> list[Path]:
    """Write ``results.json`` and ``table.md`` into a folder, which is made if need be; each in full or not at all.

    Raises:
        DataError: the folder can't be made or written to.
    """
    folder = check_folder(out)
    text = json.dumps(result.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    paths = [folder / "results.json", folder / "table.md"]
    for path, content in zip(paths, (text, markdown(result)), strict=True):
        with replacing(path) as partial:
            partial.write_text(content, encoding="utf-8")
    return paths
