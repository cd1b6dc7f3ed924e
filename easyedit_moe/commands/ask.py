"""``easyedit-moe ask``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from easyedit_moe.commands import options
from easyedit_moe.commands.printing import say_json, show_rows
from easyedit_moe.commands.reporting import shows_progress


def ask(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to ask, each in quotes.")],
    model: options.Model = "factworld",
    patch: options.Patches = None,
    chat: options.Chat = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 16,
    temperature: Annotated[float, typer.Option(help="Above 0: answers are drawn; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of the probability that is drawn from.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    as_json: options.AsJson = False,
    dtype: options.PatchDType = "",
    device: options.Device = "",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Ask a model, and the same model with patches on it: answers before and after side by side."""
    from easyedit_moe.evaluation.generation import Sampling
    from easyedit_moe.workflow.ask import ask as run

    found = run(
        prompts, model, patch or [], chat, max_new_tokens, Sampling(temperature, top_p, seed),
        options.loading_of(dtype, device, trust_remote_code), shows_progress(),
    )  # fmt: skip
    if as_json:
        say_json([asdict(one) for one in found])
        return
    header = ("prompt", "answer") if not patch else ("prompt", "before", "after")
    rows = [[one.prompt, one.before.text, *([one.after.text] if one.after else [])] for one in found]
    show_rows(header, rows)
