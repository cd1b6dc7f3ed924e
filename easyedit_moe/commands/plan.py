"""``easyedit-moe plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from easyedit_moe.commands.printing import say, show_table
from easyedit_moe.commands.statistics_lines import statistics_lines

if TYPE_CHECKING:
    from rich.table import Table

    from easyedit_moe.editors.planner import MemoryPlan


def plan(
    model: Annotated[str, typer.Option(help="Hub name or folder; only its config is read.")] = "factworld",
    method: Annotated[str, typer.Option(help="Method to plan for; default: that of the YAML file, or MoTE.")] = "",
    hparams: Annotated[str | None, typer.Option(help="A YAML file instead; or a folder of them.")] = None,
    edits: Annotated[int, typer.Option(min=0, help="Edits per batch; 0: as in the hparams.")] = 0,
    earlier: Annotated[int, typer.Option(min=0, help="Edits of earlier batches that are remembered.")] = 0,
    budget: Annotated[float, typer.Option(min=0, help="Memory of all devices in GB, to fit chunks to; 0: none.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; default: that of the hparams.")] = "",
) -> None:
    """Print what an edit will need of memory, and its statistics of disk and time, before any weight is loaded."""
    from easyedit_moe.comparison.settings import chosen_methods, loading_settings, resolve_hparams
    from easyedit_moe.editors import editor_class
    from easyedit_moe.editors.planner import Workload
    from easyedit_moe.editors.statistics_plan import plan_statistics
    from easyedit_moe.moe.loading import empty_model

    name = method or chosen_methods([], hparams)[0]
    overrides = {"dtype": dtype} if dtype else {}
    settings = resolve_hparams(name, model, hparams, overrides)
    loading = loading_settings([settings], model)
    loaded_as = dtype or loading.dtype
    limit = int(budget * 1e9) if budget else None
    workload = Workload(edits or None, earlier, limit)
    empty = empty_model(model, loaded_as, loading.trust_remote_code)
    found = editor_class(name).plan_for(settings, empty, workload)
    show_table(_table(found, f"{settings.alg_name} on {model}, GB", loaded_as))
    say(", ".join(f"{name} {value}" for name, value in found.settings.items()))
    for line in statistics_lines(plan_statistics(settings, empty), settings):
        say(line)
    if not found.fits:
        say(f"The peak of {found.peak / 1e9:.1f} GB does not fit {budget} GB.")
        raise typer.Exit(1)


def _table(found: MemoryPlan, title: str, loaded_as: str) -> Table:
    from rich.table import Table

    table = Table("stage", title=title)
    for name in ("kept", "while it runs", "peak"):
        table.add_column(name, justify="right")
    table.add_column("note")
    weights = f"{found.shapes.parameters / 1e9:.3f}"
    table.add_row("model", weights, "", weights, loaded_as)
    for stage, peak in zip(found.stages, found.peaks(), strict=True):
        table.add_row(stage.name, *(f"{n / 1e9:.3f}" for n in (stage.kept, stage.working, peak)), stage.note)
    return table
