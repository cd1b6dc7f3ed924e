"""The command ``easyedit-moe``."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

app = typer.Typer(
    help="Knowledge editing for Mixture-of-Experts language models.", no_args_is_help=True, add_completion=False
)

TABLE_WIDTH = 176  # a narrower terminal wraps whole lines, which reads better than columns cut to three letters


@app.callback()
def _setup(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")] = False) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")


@app.command()
def compare(
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[METHOD]...", help="More methods, so that --methods A B C works.")
    ] = None,
    model: Annotated[str, typer.Option(help="Hub name or folder; default: the bundled trained model.")] = "factworld",
    data: Annotated[
        str, typer.Option(help="JSON file of records; factworld and factworld-easyedit ship.")
    ] = "factworld",
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Methods, ours and EasyEdit's, separated by spaces or commas; all: every one of ours. Default: five."
        ),
    ] = None,
    edits: Annotated[int, typer.Option(help="Number of records to edit.")] = 100,
    skip: Annotated[int, typer.Option(help="Number of records to leave out at the start.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Edits per batch; batches follow each other.")] = 50,
    hparams: Annotated[
        str | None, typer.Option(help="A YAML file, or a folder of <METHOD>/<model>.yaml; default: those that ship.")
    ] = None,
    out: Annotated[str, typer.Option(help="Folder for results.json, table.md and comparison.png.")] = "results",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; default: that of the hparams.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; default: that of the hparams.")] = "",
    stats_dir: Annotated[str, typer.Option(help="Folder of cached statistics; default: that of the hparams.")] = "",
    easyedit_metrics: Annotated[
        bool | None, typer.Option(help="Score by EasyEdit's protocol, too; default: if a method is EasyEdit's.")
    ] = None,
) -> None:
    """Edit the same records by several methods and print a side-by-side table, scored after all edits."""
    from rich.console import Console

    from easyedit_moe import host
    from easyedit_moe.comparison import compare as comparing
    from easyedit_moe.comparison import report
    from easyedit_moe.errors import EditingError

    console = Console()
    wide = Console(width=max(console.width, TABLE_WIDTH))
    try:
        names = _split([*(methods or []), *(more or [])]) or list(comparing.DEFAULT_METHODS)
        if names == ["all"]:
            names = list(comparing.ALL_METHODS)
        overrides = {"device": device, "dtype": dtype, "stats_dir": stats_dir}
        overrides = {name: value for name, value in overrides.items() if value}
        settings = [
            comparing.resolve_hparams(name, model, hparams, {**overrides, "model_name": model}) for name in names
        ]
        folder = report.check_folder(out)
        if easyedit_metrics is None:
            easyedit_metrics = any(name in comparing.HOST_METHODS for name in names)
        if easyedit_metrics:
            host.load()
        first = comparing.loading_settings(settings, model)
        task = comparing.load_task(
            model, data, edits, skip, batch_size, dtype or first.dtype, device or first.device, first.model_parallel
        )
        result = comparing.compare(
            task,
            settings,
            on_row=lambda row: console.print(f"{row.method}: {_brief(row)}"),
            easyedit_metrics=easyedit_metrics,
        )
        paths = report.write_results(result, folder)
    except EditingError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {type(error).__name__}: {error}", highlight=False)
        raise typer.Exit(2) from error
    for table in report.tables(result):
        wide.print(table)
    wide.print("Written: " + ", ".join(str(path) for path in paths), highlight=False)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="Hub name or folder; only its config is read.")] = "factworld",
    method: Annotated[str, typer.Option(help="Method whose shipped hparams are planned for.")] = "MoTE",
    hparams: Annotated[str | None, typer.Option(help="A YAML file instead; or a folder of them.")] = None,
    edits: Annotated[int, typer.Option(help="Edits per batch; 0: as in the hparams.")] = 0,
    earlier: Annotated[int, typer.Option(help="Edits of earlier batches that are remembered.")] = 0,
    budget: Annotated[float, typer.Option(help="Memory of all devices in GB, to fit chunk sizes to; 0: none.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; default: that of the hparams.")] = "",
) -> None:
    """Print what each stage of an edit will need of memory, before any weight is loaded."""
    from rich.console import Console
    from rich.table import Table

    from easyedit_moe.comparison import compare as comparing
    from easyedit_moe.editors import planner
    from easyedit_moe.errors import EditingError
    from easyedit_moe.moe.loading import empty_model

    try:
        settings = comparing.resolve_hparams(method, model, hparams, {"dtype": dtype} if dtype else {})
        shapes = planner.shapes_of(empty_model(model, settings.dtype), settings.layers)
        limit = int(budget * 1e9) if budget else None
        found = planner.plan(
            shapes, settings, edits or None, earlier, budget=limit, device=str(settings.device).split(":")[0]
        )
    except EditingError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {type(error).__name__}: {error}", highlight=False)
        raise typer.Exit(2) from error
    table = Table("stage", "kept", "while it runs", "peak", "", title=f"{settings.alg_name} on {model}, GB")
    table.add_row("model", f"{shapes.parameters / 1e9:.3f}", "", f"{shapes.parameters / 1e9:.3f}", settings.dtype)
    for stage, peak in zip(found.stages, found.peaks(), strict=True):
        table.add_row(stage.name, *(f"{n / 1e9:.3f}" for n in (stage.kept, stage.working, peak)), stage.note)
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in found.settings.items()), highlight=False)
    if not found.fits:
        console.print(f"The peak of {found.peak / 1e9:.1f} GB does not fit {budget} GB.", highlight=False)
        raise typer.Exit(1)


@app.command()
def methods() -> None:
    """List all methods and the models that hparams ship for."""
    from rich.console import Console

    from easyedit_moe.editors import editor_class, method_names
    from easyedit_moe.host.baseline_hparams import HOST_METHODS
    from easyedit_moe.hparams import hparams_folder

    console = Console()
    for name in method_names():
        models = ", ".join(sorted(p.stem for p in (hparams_folder() / name).glob("*.yaml")))
        summary = (editor_class(name).__doc__ or "").strip().splitlines()[0]
        console.print(f"[bold]{name}[/]: {summary} [dim]({models})[/]", highlight=False)
    for name in HOST_METHODS:
        models = ", ".join(sorted(p.stem for p in (hparams_folder() / name).glob("*.yaml")))
        console.print(f"[bold]{name}[/]: EasyEdit's own, where it is there. [dim]({models})[/]", highlight=False)


def _split(names: list[str] | None) -> list[str]:
    return [part.strip() for name in names or [] for part in name.split(",") if part.strip()]


def _brief(row: object) -> str:
    scores = row.scores
    return (
        f"efficacy {scores.efficacy.mean:.1f}, generalisation {scores.generalisation.mean:.1f}, "
        f"specificity {scores.specificity.mean:.1f}"
    )


def main() -> None:
    """Entry point of the console script."""
    app()
