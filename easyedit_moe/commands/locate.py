"""``easyedit-moe locate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from easyedit_moe.commands import options
from easyedit_moe.commands.compare import split_names
from easyedit_moe.commands.printing import note, say, say_json, show_rows
from easyedit_moe.commands.reporting import shows_progress
from easyedit_moe.errors import LayerError

if TYPE_CHECKING:
    from easyedit_moe.workflow.locate import Location


Facts = Annotated[
    str | None,
    typer.Argument(
        metavar="FACTS",
        help="File of facts: .csv, .tsv, .json or .jsonl; default: neutral ones that ship, or the bundled model's own.",
    ),
]
Out = Annotated[str, typer.Option(help="Folder for results.json, table.md and locate.png.")]
Edits = Annotated[int | None, typer.Option(help="Facts to measure and edit; default: 20.")]
Skip = Annotated[
    int | None, typer.Option(help="Facts to leave out at the start; default: 0, of the bundled model's own 200.")
]
Layers = Annotated[str, typer.Option(help="MoE layers to measure, such as 0-7 or 0,2,4; default: all of them.")]
Widths = Annotated[str, typer.Option(help="Layers per window, such as 1,2,5; default: 1, 2 and as in the hparams.")]
Windows = Annotated[int, typer.Option(help="Most windows to try.")]
Measure = Annotated[
    list[str] | None,
    typer.Option(help="Of routing, tracing, reachability, statistics, trial, experts, with commas; default: all."),
]
Samples = Annotated[int, typer.Option(help="Draws of the noise per fact in causal tracing.")]
Budget = Annotated[float | None, typer.Option(help="Minutes: no step is begun that is expected to end later.")]
Estimate = Annotated[bool, typer.Option("--estimate", help="Only say how long it would take.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on after an interruption or a budget: rows of results.json are kept.")
]


def locate(
    facts: Facts = None,
    model: options.Model = "factworld",
    method: options.Method = "",
    hparams: options.HParams = None,
    out: Out = "located",
    edits: Edits = None,
    skip: Skip = None,
    layers: Layers = "",
    widths: Widths = "",
    windows: Windows = 24,
    measure: Measure = None,
    samples: Samples = 10,
    budget: Budget = None,
    estimate: Estimate = False,
    resume: Resume = False,
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
        edits, skip, layers=whole_numbers(layers), widths=whole_numbers(widths), windows=windows,
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


def whole_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers and ranges such as 3-7, separated by commas, in order and each once.

    Raises:
        LayerError: something else.
    """
    found: set[int] = set()
    for part in split_names([text]):
        first, sign, last = part.partition("-")
        if not first.isdecimal() or (sign and not (last.isdecimal() and int(first) <= int(last))):
            raise LayerError(f"Layers and widths are whole numbers such as 3, or ranges such as 3-7; found {part!r}.")
        found.update(range(int(first), int(last if sign else first) + 1))
    return tuple(sorted(found))
