"""What the scripts share that compare variants of a method on the bundled model."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from easyedit_moe.comparison.compare import Comparison, compare
from easyedit_moe.comparison.task import Task, load_task
from easyedit_moe.hparams import MoEHyperParams


def compared(
    variants: Mapping[str, MoEHyperParams],
    console: Console,
    edits: int,
    skip: int,
    batch_size: int,
    model: str = "factworld",
    data: str = "factworld",
) -> tuple[Task, Comparison]:
    """A row per variant, under its name, on records of a file, by default the bundled one; and the task, restored."""
    first = next(iter(variants.values()))
    task = load_task(model, data, edits, skip, batch_size, first.dtype, first.device)
    settings, names = list(variants.values()), list(variants)
    return task, compare(task, settings, on_row=lambda row: console.print("done:", row.method), labels=names)
