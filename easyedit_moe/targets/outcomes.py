"""What became of each target, and the warnings about those that were known or missed; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from easyedit_moe.errors import KnownFactsWarning, TargetNotReachedWarning

MORE_SEARCH = "More v_num_grad_steps, a larger v_lr or clamp_norm_factor, or earlier layers may help."
"""What to change where target vectors miss their targets."""


@dataclass(frozen=True)
class Outcome:
    """A target and what became of it; what was not measured is None.

    Attributes:
        prompt, target: texts.
        initial_nll, final_nll: mean NLL in nats per token of the target, before and after.
        reached: whether, after the bare prompt, every token of the target is the most likely one in the end.
        known: whether it was so before.
    """

    prompt: str
    target: str
    initial_nll: float | None
    final_nll: float | None
    reached: bool | None
    known: bool | None


def known_warning(outcomes: Sequence[Outcome]) -> KnownFactsWarning | None:
    """About the targets that were the model's answer before anything was done."""
    known = [one for one in outcomes if one.known]
    if not known:
        return None
    return KnownFactsWarning(
        f"{len(known)} of {len(outcomes)} targets already are the model's answer, the first for "
        f"{known[0].prompt!r} -> {known[0].target!r}."
    )


def missed_warning(outcomes: Sequence[Outcome], advice: str) -> TargetNotReachedWarning | None:
    """About the targets that are not the most likely answer in the end; ``advice`` says what may help."""
    missed = [one for one in outcomes if one.reached is False]
    if not missed:
        return None
    worst = max(missed, key=lambda one: one.final_nll or 0.0)
    level = "" if worst.final_nll is None else f" at NLL {worst.final_nll:.2f} per token"
    return TargetNotReachedWarning(
        f"{len(missed)} of {len(outcomes)} targets were not reached; the worst is {worst.prompt!r} -> "
        f"{worst.target!r}{level}. {advice}"
    )
