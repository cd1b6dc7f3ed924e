"""``easyedit-moe locate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from easyedit_moe.commands import options
from easyedit_moe.commands.compare import split_names
from easyedit_moe.commands.reporting import shows_progress
from easyedit_moe.commands.tables import note, say, say_json, show_rows
from easyedit_moe.errors import LayerError

if TYPE_CHECKING:
    from easyedit_moe.workflow.locate import Location


def locate(
    facts: Annotated[
        str | None,
        typer.Argument(
            metavar="[FACTS]",
            help="File of facts: .csv, .tsv, .json or .jsonl. Default: neutral ones that ship; for the bundled model "
            "its own.",
        ),
    ] = None,
    model: options.Model = "factworld",
    method: options.Method = "",
    hparams: options.HParams = None,
    out: Annotated[str, typer.Option(help="Folder for results.json, table.md and locate.png.")] = "located",
    edits: Annotated[int | None, typer.Option(help="Facts to measure and edit; default: 20.")] = None,
    skip: Annotated[
        int | None, typer.Option(help="Facts to leave out at the start; default: 0, of the bundled model's own 200.")
    ] = None,
    layers: Annotated[
        str, typer.Option(help="MoE layers to measure, such as 0-7 or 0,2,4; default: all of them.")
    ] = "",
    widths: Annotated[
        list[str] | None,
        typer.Option(help="Layers per window, separated by commas; default: 1, 2 and as in the hparams."),
    ] = None,
    windows: Annotated[int, typer.Option(help="Most windows to try.")] = 24,
    measure: Annotated[
        list[str] | None,
        typer.Option(help="Of routing, tracing, reachability, trial, experts, with commas; default: all."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Draws of the noise per fact in causal tracing.")] = 10,
    budget: Annotated[
        float | None, typer.Option(help="Minutes: no step is begun that is expected to end later.")
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only say how long it would take.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after an interruption or a budget: rows of results.json are kept.")
    ] = False,
    chat: options.EditsInChat = False,
    settings: options.Settings = None,
    stats_dir: options.StatsDir = "",
    dtype: options.DType = "",
    device: options.Device = "",
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure which layers and experts hold facts, and try edits at windows of layers; the model stays as it is.

    By layer: what a shift of the hidden state reaches, causal tracing with restored MoE outputs and single experts, and
    how alike fact tokens are routed. By window: scores after edits, which are taken back.
    """
    from easyedit_moe.localisation.tracing import TraceSettings
    from easyedit_moe.workflow.locate import locate as run
    from easyedit_moe.workflow.locate_report import cost_line, write_location
    from easyedit_moe.workflow.locate_settings import STAGES, LocateSettings

    given = options.settings_of(
        settings, stats_dir=stats_dir, dtype=dtype, device=device, trust_remote_code=trust_remote_code, chat=chat
    )
    chosen = LocateSettings(
        edits, skip, layers=whole_numbers([layers]), widths=whole_numbers(widths or []), windows=windows,
        stages=tuple(split_names(measure or [])) or STAGES, tracing=TraceSettings(samples=samples), budget=budget,
    )  # fmt: skip
    found = run(
        facts, model, method, hparams, None if estimate else out, chosen, resume, not estimate, given,
        lambda costs: note(cost_line(costs, budget)), shows_progress(),
    )  # fmt: skip
    if estimate:
        return
    paths = write_location(found, out)
    if as_json:
        say_json(found.to_dict())
    else:
        _show(found)
    note("Written: " + ", ".join(str(path) for path in paths))


def _show(found: Location) -> None:
    from easyedit_moe.workflow import locate_report as report

    show_rows(report.LAYER_COLUMNS, report.layer_cells(found))
    show_rows(report.TRIAL_COLUMNS, report.trial_cells(found))
    show_rows(report.EXPERT_COLUMNS, report.expert_cells(found))
    for line in report.verdict(found):
        say(line)
    if found.measured.left and not found.measured.complete:
        note("The same command with --resume goes on.")


def whole_numbers(texts: Sequence[str]) -> tuple[int, ...]:
    """Whole numbers and ranges such as 3-7, separated by commas, in order and each once.

    Raises:
        LayerError: something else.
    """
    found: set[int] = set()
    for text in split_names(list(texts)):
        first, sign, last = text.partition("-")
        if not first.isdecimal() or (sign and not (last.isdecimal() and int(first) <= int(last))):
            raise LayerError(f"Layers and widths are whole numbers such as 3, or ranges such as 3-7; found {text!r}.")
        found.update(range(int(first), int(last if sign else first) + 1))
    return tuple(sorted(found))
