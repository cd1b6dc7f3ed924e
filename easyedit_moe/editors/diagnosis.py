"""What an edit did, as a value, and the warnings that follow from it; pure.

A weight can be left as it was for many reasons (an empty null space, rounding, facts that are known, a lambda that is
too large), and scores then say nothing but "no effect". Each editor fills in an `EditDiagnosis`, as far as its method
knows the concepts, and `warnings_of` names what went wrong and the setting to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from easyedit_moe.errors import (
    EditingWarning,
    LossUnchangedWarning,
    NoUpdateWarning,
    NullSpaceWarning,
    ResidualNotReachedWarning,
    RidgeTooLargeWarning,
    RoundingWarning,
)
from easyedit_moe.targets.outcomes import MORE_SEARCH, Outcome, known_warning, missed_warning

LITTLE = 0.5
"""A share of the wanted residual below which a fact is warned of."""
LOST = 0.9
"""A rounding loss from which an update counts as lost; such a loss keeps less than a fifth of its squared norm."""
HARDLY = 0.9
"""A share of the loss that must not be left after training."""

SETTINGS = (
    "lambda_reg", "lambda_relative", "metric", "nullspace_threshold", "nullspace_relative", "nullspace_energy",
    "nullspace_rank", "low_coverage", "min_coverage", "spread", "variant", "rank_in", "tucker_energy", "num_passes",
    "lr", "num_steps", "optim_num_step", "steps", "early_stop_loss", "norm_constraint",
)  # fmt: skip
"""Hyper-parameters that warnings name; a diagnosis keeps those that its method has."""


@dataclass(frozen=True)
class FactDiagnosis(Outcome):
    """One fact.

    ``final_nll`` and ``reached`` are those of the target vector for methods that search one, and of the trained model
    for methods that train on answers.

    Attributes:
        residual_share: how far the hidden state at the fact token moved towards its target vector: the projection of
            its move on the wanted residual, as a share of it; the mean over contexts. 1 is all of it. None for methods
            without target vectors, and where nothing was wanted.
    """

    residual_share: float | None = None


@dataclass(frozen=True)
class ExpertDiagnosis:
    """One expert that the facts are routed to.

    Attributes:
        expert: its index.
        relative_update: ``||W' - W|| / ||W||`` of its down-projection, as it is stored; None where W is zero.
        null_space: dimension of its null space; None for another metric.
        coverage: tokens of the corpus that reached it; None without statistics.
    """

    expert: int
    relative_update: float | None
    null_space: int | None = None
    coverage: int | None = None


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer of a method that solves.

    Attributes:
        layer: its index.
        experts: those that the facts are routed to; where the method did not look (``spread: update``, all layers but
            the last), those that were written.
        rounding_loss: ``||applied - intended|| / ||intended||`` of its writes.
        fit: share of the residual wanted of this layer that the solution makes up for, by the solver's arithmetic;
            None where the layer was not solved for.
        shrinkage: how much the fit would gain by scaling the solution: 0 is the best scale, near 1 a ridge that leaves
            next to nothing. ``1 - ||F||^2 / <F, R>``, F what the solution moves and R the residual.
    """

    layer: int
    experts: tuple[ExpertDiagnosis, ...]
    rounding_loss: float
    fit: float | None = None
    shrinkage: float | None = None


@dataclass(frozen=True)
class ParameterDiagnosis:
    """One parameter of a method that trains.

    Attributes:
        name: its full name.
        relative_update: ``||W' - W|| / ||W||``, before W' was rounded where that is known; None where W is zero.
        rounding_loss: ``||applied - intended|| / ||intended||``; None where it is not known.
    """

    name: str
    relative_update: float | None
    rounding_loss: float | None


@dataclass(frozen=True)
class EditDiagnosis:
    """What an edit did; concepts that a method lacks are empty or None.

    Attributes:
        method: its name.
        facts: one per request, in order.
        layers: of methods that solve.
        parameters: of methods that train.
        dtype: of what was edited, such as "bfloat16".
        changed: whether any bit of the weights is another; None for an adapter, which leaves them alone.
        rounding_loss: of all writes together.
        steps: updates that training made, or that the longest search of a target vector made.
        remembered: keys of earlier edits that the solver held in place.
        settings: hyper-parameters that warnings name (`SETTINGS`).
    """

    method: str
    facts: tuple[FactDiagnosis, ...]
    layers: tuple[LayerDiagnosis, ...] = ()
    parameters: tuple[ParameterDiagnosis, ...] = ()
    dtype: str | None = None
    changed: bool | None = None
    rounding_loss: float | None = None
    steps: int | None = None
    remembered: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As strict JSON: lists for tuples, None for what is not finite."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    @property
    def hit(self) -> list[ExpertDiagnosis]:
        """The experts of all layers that the facts are routed to."""
        return [expert for layer in self.layers for expert in layer.experts]

    @property
    def lost(self) -> bool:
        """Whether an update was wanted, and rounding swallowed it."""
        return self.rounding_loss is not None and self.rounding_loss >= LOST

    def frozen(self, expert: ExpertDiagnosis) -> bool:
        """Whether an expert may not be edited because too few tokens reached it."""
        told = self.settings.get("low_coverage") == "frozen" and expert.coverage is not None
        return told and expert.coverage < self.settings["min_coverage"]


def settings_of(hparams: Any) -> dict[str, Any]:
    """Those of `SETTINGS` that hyper-parameters have."""
    return {name: getattr(hparams, name) for name in SETTINGS if hasattr(hparams, name)}


def warnings_of(diagnosis: EditDiagnosis) -> list[EditingWarning]:
    """Everything to be told about an edit, each cause once; nothing of an edit that went well."""
    found = (check(diagnosis) for check in CHECKS)
    return [warning for warning in found if warning is not None]


def _known(d: EditDiagnosis) -> EditingWarning | None:
    return known_warning(d.facts)


def _missed(d: EditDiagnosis) -> EditingWarning | None:
    return missed_warning(d.facts, _more_training(d) if _trains_on_answers(d) else MORE_SEARCH)


def _null_space(d: EditDiagnosis) -> EditingWarning | None:
    empty = [
        layer.layer
        for layer in d.layers
        for expert in layer.experts
        if expert.null_space == 0 and not expert.relative_update and not d.frozen(expert)
    ]
    if not empty:
        return None
    return NullSpaceWarning(
        f"{len(empty)} of {len(d.hit)} experts that the facts are routed to ({_layers(empty)}) have an empty null "
        f"space and can't be edited: {_why_empty(d)}. {_larger_null_space(d)}, or choose metric: identity."
    )


def _why_empty(d: EditDiagnosis) -> str:
    energy, threshold = d.settings.get("nullspace_energy"), d.settings.get("nullspace_threshold")
    if energy is not None:
        return f"all directions of their keys' moment are needed to hold {energy:g} of its energy"
    share = " of its largest" if d.settings["nullspace_relative"] else ""
    return f"no eigenvalue of their keys' moment is below {threshold:g}{share}"


def _larger_null_space(d: EditDiagnosis) -> str:
    """The setting that gives experts a larger null space."""
    if d.settings.get("nullspace_energy") is not None:
        return "Lower nullspace_energy"
    return f"Raise {'nullspace_rank' if d.settings.get('nullspace_rank') is not None else 'nullspace_threshold'}"


def _ridge(d: EditDiagnosis) -> tuple[str, float] | None:
    """Name and value of the setting that says the ridge; None for methods without one."""
    found = ((name, d.settings.get(name)) for name in ("lambda_reg", "lambda_relative"))
    return next(((name, value) for name, value in found if value is not None), None)


def _nothing(d: EditDiagnosis) -> EditingWarning | None:
    if d.changed is None or (d.changed and not d.lost):
        return None
    if d.lost:
        share = f"{min(d.rounding_loss or 1.0, 1.0):.0%}"
        left = "" if d.changed else ", and every weight is what it was before"
        larger = f" A larger {_rate(d)} makes larger updates." if "lr" in d.settings else ""
        ridge = _ridge(d)
        larger = f" A smaller {ridge[0]} makes larger updates." if ridge else larger
        return RoundingWarning(
            f"Rounding to {d.dtype} swallowed {share} of the update{left}. Load the model in a finer dtype (float32)."
            f"{larger}"
        )
    return NoUpdateWarning(f"The update is zero: every weight is what it was before. {_why_zero(d)}")


def _why_zero(d: EditDiagnosis) -> str:
    if d.steps == 0:
        return (
            f"No step was made, as the loss of each fact was below early_stop_loss "
            f"({d.settings.get('early_stop_loss'):g}) from the start: the model knows these facts. A lower "
            "early_stop_loss makes it surer of them."
        )
    if d.hit and all(d.frozen(expert) for expert in d.hit):
        return (
            "Fewer than min_coverage tokens of the corpus reached the experts that the facts are routed to, and "
            "low_coverage is 'frozen'. Lower min_coverage, choose another low_coverage, or use a larger corpus."
        )
    if d.hit and all(expert.null_space == 0 for expert in d.hit):
        wider = _larger_null_space(d)
        return f"The null space of every expert that the facts are routed to is empty: {wider[0].lower()}{wider[1:]}."
    ridge = _ridge(d)
    if ridge:
        return f"Lower {ridge[0]}, and see that v_lr and v_num_grad_steps move the target vectors."
    if "lr" in d.settings:
        return f"What is trained does not reach the loss, or {_rate(d)} is too small: choose other layers, or raise it."
    return "Choose other layers, or larger steps."


def _residual(d: EditDiagnosis) -> EditingWarning | None:
    shares = [(fact.residual_share, fact.prompt) for fact in d.facts if fact.residual_share is not None]
    short = [one for one in shares if one[0] < LITTLE]
    if not short or d.lost or not d.changed:
        return None  # the cause is told already
    least, prompt = min(short)
    text = (
        f"{len(short)} of {len(d.facts)} facts moved less than half of the way to their target vectors; the least, "
        f"{prompt!r}, {least:.0%} of it. "
    )
    solved = next((layer for layer in reversed(d.layers) if layer.fit is not None), None)
    fit = 1.0 if solved is None or solved.fit is None else solved.fit
    typical = sorted(short)[len(short) // 2][0]
    if solved is not None and fit < LITTLE and (solved.shrinkage or 0.0) > LITTLE:
        return RidgeTooLargeWarning(text + _shrunk(d, solved))
    if solved is None or fit >= LITTLE or typical < LITTLE * fit:
        return ResidualNotReachedWarning(text + _why_not_as_solved(d))
    return ResidualNotReachedWarning(text + _why_not_solved(d, solved))


def _shrunk(d: EditDiagnosis, layer: LayerDiagnosis) -> str:
    name, ridge = _ridge(d) or ("lambda_reg", 0.0)
    shrinkage = layer.shrinkage or 1.0
    also = f", with {d.remembered} keys that remember_edits keeps," if d.remembered else ""
    return (
        f"{name} {ridge:g}{also} shrinks the update of layer {layer.layer} to {1 - shrinkage:.1%} of what fits "
        f"best. Lower {name} below {ridge * (1 - shrinkage) / shrinkage:.1g}."
    )


def _why_not_as_solved(d: EditDiagnosis) -> str:
    """The solver's own arithmetic reaches more, or there is no solver."""
    if "optim_num_step" in d.settings:
        return f"Raise {_rate(d)} or optim_num_step ({d.settings['optim_num_step']}), or lower preserve_weight."
    if d.settings.get("spread") == "update":
        return (
            "The last layer's solution is shared out to all layers (spread: update), which need not move the state as "
            "it does; spread: residual, or a method with it, solves for each layer."
        )
    return "Other layers, or fewer of them, may follow the solution better."


def _why_not_solved(d: EditDiagnosis, layer: LayerDiagnosis) -> str:
    ranks = "tucker_energy" if d.settings.get("tucker_energy") else "rank_in, rank_out and rank_expert"
    raised = [ranks] if "rank_in" in d.settings else []
    raised += ["num_passes"] if "num_passes" in d.settings else []
    may = [f"raise {' or '.join(raised)}"] if raised else []
    if d.settings.get("metric") == "nullspace":
        wider = _larger_null_space(d)
        may = [" or ".join([wider, *raised])] if wider.startswith("Raise") else [wider, *may]
    advice = ", ".join([*may, "or edit" if may else "edit"])
    advice = advice[0].upper() + advice[1:]
    return f"No solution of layer {layer.layer} comes nearer than {layer.fit:.0%}. {advice} fewer facts at once."


def _loss(d: EditDiagnosis) -> EditingWarning | None:
    pairs = [(f.initial_nll, f.final_nll) for f in d.facts if f.initial_nll is not None and f.final_nll is not None]
    if not pairs or not _trains_on_answers(d) or d.lost or not d.changed:
        return None
    before, after = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    if after <= HARDLY * before:
        return None
    return LossUnchangedWarning(
        f"Training left the loss where it was: {before:.3g} before and {after:.3g} after, in nats per token. "
        f"{_more_training(d)}"
    )


def _trains_on_answers(d: EditDiagnosis) -> bool:
    return "num_steps" in d.settings or "steps" in d.settings


def _rate(d: EditDiagnosis) -> str:
    bound = d.settings.get("norm_constraint")
    return f"lr ({d.settings['lr']:g})" + (f" or norm_constraint ({bound:g})" if bound else "")


def _more_training(d: EditDiagnosis) -> str:
    steps = "num_steps" if "num_steps" in d.settings else "steps"
    return f"A larger {_rate(d)}, more {steps} ({d.settings[steps]}) or other layers may help."


CHECKS: tuple[Callable[[EditDiagnosis], EditingWarning | None], ...] = (
    _known, _missed, _null_space, _nothing, _residual, _loss,
)  # fmt: skip


def _layers(indices: Iterable[int]) -> str:
    distinct = sorted(set(indices))
    return f"layer{'s' if len(distinct) > 1 else ''} {', '.join(map(str, distinct))}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
