"""``easyedit-moe compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from easyedit_moe.commands import options
from easyedit_moe.commands.reporting import shows_progress
from easyedit_moe.commands.tables import note, show_table

if TYPE_CHECKING:
    from easyedit_moe.comparison.compare import Comparison, Row
    from easyedit_moe.comparison.settings import AnyHyperParams
    from easyedit_moe.comparison.task import Task


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
            help="Methods, ours and EasyEdit's, separated by spaces or commas; all: every one of ours. "
            "Default: that of the YAML file, or five."
        ),
    ] = None,
    edits: Annotated[int, typer.Option(help="Number of records to edit.")] = 100,
    skip: Annotated[int, typer.Option(help="Number of records to leave out at the start.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Edits per batch; batches follow each other.")] = 50,
    hparams: Annotated[
        str | None,
        typer.Option(help="A YAML file of one method, or a folder of <METHOD>/<model>.yaml; default: those that ship."),
    ] = None,
    out: Annotated[str, typer.Option(help="Folder for results.json, table.md and comparison.png.")] = "results",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; default: that of the hparams.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; default: that of the hparams.")] = "",
    stats_dir: Annotated[str, typer.Option(help="Folder of cached statistics; default: that of the hparams.")] = "",
    easyedit_metrics: Annotated[
        bool | None, typer.Option(help="Score by EasyEdit's protocol, too; default: if a method is EasyEdit's.")
    ] = None,
    chat: options.EditsInChat = False,
    resume: Annotated[
        bool, typer.Option(help="Go on after an interruption: rows of results.json that would come out again are kept.")
    ] = False,
) -> None:
    """Edit the same records by several methods and print a side-by-side table, scored after all edits."""
    from easyedit_moe import host
    from easyedit_moe.comparison.report import check_folder, tables, write_results
    from easyedit_moe.comparison.settings import chosen_methods, loading_settings, method_files, resolve_methods
    from easyedit_moe.comparison.task import load_task
    from easyedit_moe.comparison.tuned import check_held_out
    from easyedit_moe.host.baseline_hparams import HOST_METHODS

    names = chosen_methods(split_names([*(methods or []), *(more or [])]), hparams)
    given = options.settings_of(None, device=device, dtype=dtype, stats_dir=stats_dir, chat=chat)
    settings = resolve_methods(names, model, hparams, {**given, "model_name": model})
    folder = check_folder(out)
    if easyedit_metrics is None:
        easyedit_metrics = any(name in HOST_METHODS for name in names)
    if easyedit_metrics:
        host.load()
    first = loading_settings(settings, model)
    task = load_task(
        model, data, edits, skip, batch_size, dtype or first.dtype, device or first.device, first.model_parallel,
        first.trust_remote_code, shows_progress(), any(getattr(hp, "chat", False) for hp in settings),
    )  # fmt: skip
    check_held_out(hparams, task.records, method_files(names, model, hparams))
    result = _run(task, settings, folder, easyedit_metrics, resume)
    paths = write_results(result, folder)
    for table in tables(result):
        show_table(table)
    note("Written: " + ", ".join(str(path) for path in paths))


def _run(task: Task, settings: list[AnyHyperParams], folder: Path, easyedit_metrics: bool, resume: bool) -> Comparison:
    """The comparison, each of whose rows is on disk once it is done."""
    from easyedit_moe.comparison.compare import compare as run
    from easyedit_moe.comparison.saved import earlier_rows, save_rows

    earlier = earlier_rows(folder, task.provenance, [hp.alg_name for hp in settings]) if resume else []
    done = [row.method for row in earlier]

    def told(row: Row) -> None:
        done.append(row.method)
        note(f"{row.method}: {brief(row)}")

    def keep(so_far: Comparison) -> None:
        save_rows(so_far, folder)

    if earlier:
        note(f"Going on after {len(earlier)} rows of {folder}: {', '.join(done)}.")
    try:
        return run(task, settings, told, (), easyedit_metrics, earlier, keep, shows_progress())
    except BaseException:
        if done:
            note(f"Rows that are done are in {folder}; the same command with --resume goes on after them.")
        raise


def split_names(names: list[str]) -> list[str]:
    """Names that are separated by spaces (one each) or by commas."""
    return [part.strip() for name in names for part in name.split(",") if part.strip()]


def brief(row: Row) -> str:
    """A row's scores in one line, shown when the method is done."""
    scores = row.scores
    return (
        f"efficacy {scores.efficacy.mean:.1f}, generalisation {scores.generalisation.mean:.1f}, "
        f"specificity {scores.specificity.mean:.1f}"
    )
