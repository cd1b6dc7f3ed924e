"""``easyedit-moe export``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from easyedit_moe.commands import options
from easyedit_moe.commands.printing import note, say, say_json, show_rows
from easyedit_moe.commands.reporting import shows_progress

if TYPE_CHECKING:
    from easyedit_moe.workflow.export_report import Exported


def export(
    patch: Annotated[str, typer.Argument(metavar="PATCH", help="File that edit wrote.")],
    to: Annotated[str, typer.Option(help="peft, vllm or sglang.")],
    out: Annotated[
        str | None, typer.Option(help="Folder for the adapter; default: adapter-<to> beside the patch.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Largest rank of an expert's update; default: exact.")] = None,
    model: Annotated[
        str, typer.Option(help="Checkpoint on which the patch was made; default: the name that the patch holds.")
    ] = "",
    form: Annotated[str, typer.Option(help="packed or per-expert, for peft; default: what fits the model.")] = "",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; default: that of the edited weights.")] = "",
    peft_version: Annotated[str, typer.Option(help="Version of PEFT that will read it; default: the installed.")] = "",
    score: Annotated[
        bool | None,
        typer.Option("--score/--no-score", help="Score the facts with the adapter; default: where a rank is given."),
    ] = None,
    as_json: options.AsJson = False,
    device: options.Device = "",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Write a patch as an adapter (LoRA of the experts) that PEFT, vLLM or SGLang loads on the unedited model."""
    from easyedit_moe.workflow.export import export as run

    loading = options.loading_of("", device, trust_remote_code)
    found = run(patch, to, out, rank, model, form, dtype, peft_version, score, loading, shows_progress())
    if as_json:
        say_json(found.to_dict())
        return
    _show(found)


def _show(found: Exported) -> None:
    from easyedit_moe.workflow.export_report import advice

    rows = [
        [str(one.layer), str(one.experts), str(one.exact_rank), str(one.rank), f"{one.loss:.2e}"]
        for one in found.layers
    ]
    show_rows(("layer", "experts", "exact rank", "rank", "relative loss"), rows)
    facts = [
        [f"{one.prompt} -> {one.target}", *(f"{value:.3f}{'' if first else ' (not first)'}"
         for value, first in zip(one.probability, one.first_choice, strict=True))]
        for one in found.facts
    ]  # fmt: skip
    show_rows(("probability of the new target", "base", "patch", "adapter"), facts)
    say(
        f"Written: {found.folder}, {found.form}, rank {found.rank}, {found.dtype}, in the layout that {found.checked} "
        "reads."
    )
    say(f"Load it: {found.command}")
    for text in (*advice(found), *found.remarks):
        note(text)
