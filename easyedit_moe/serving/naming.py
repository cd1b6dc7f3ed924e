"""What a checkpoint calls its experts' projections: by these names servers look for an adapter's tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence

from easyedit_moe.checkpoints.naming import CheckpointNames
from easyedit_moe.errors import PatchError
from easyedit_moe.patches.stored import StoredExperts
from easyedit_moe.serving.forms import ExpertNames

_OF_EXPERT = re.compile(r"(?P<module>.+)\.(?P<expert>\d+)\.(?P<projection>[^.]+)\.weight")
_PLAIN_INPUTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",)}
"""Parameter before the down-projections -> what it is made of."""


def checkpoint_names(names: CheckpointNames, stored: StoredExperts) -> ExpertNames:
    """What the checkpoint of a model calls one layer's experts.

    Where it holds all experts in one tensor, each has the names that PEFT and servers give to it:
    ``<module>.<expert>.down_proj``.

    Raises:
        CheckpointError: the checkpoint stores the experts in a way that can't be followed. PatchError: the model has no
            such experts.
    """
    down = stored.parameter_of(0)
    if down not in names.parameters:
        raise PatchError(f"The patch changes {down}, which {type(names.model).__name__} lacks. Is it another model?")
    if stored.single:
        module, _, projection = names.stored_names(down)[0].removesuffix(".weight").rpartition(".")
        return ExpertNames(module, projection, ())
    of_down = _of_first(names.stored_names(down))
    if stored.packed:
        before = next((name for name in _PLAIN_INPUTS if f"{stored.name}.{name}" in names.parameters), "up_proj")
        if of_down is None:
            module = names.stored_names(down)[0].removesuffix(f".{stored.parameter}")
            return ExpertNames(module, inputs=_of_each(_PLAIN_INPUTS[before]))
        inputs = _firsts(names.stored_names(f"{stored.name}.{before}"))
    else:
        inputs = _firsts([n for n in names.parameters if n.startswith(f"{stored.name}.0.") and n != down])
    if of_down is None:
        raise PatchError(f"The checkpoint stores {down} under a name without the expert's number.")
    module, projection = of_down
    return ExpertNames(module, f"{{expert}}.{projection}", _of_each(inputs))


def model_names(stored: StoredExperts) -> ExpertNames:
    """What the model in memory calls one layer's experts, in the form that PEFT reads on such a model."""
    if stored.packed:
        return ExpertNames(stored.name)
    return ExpertNames(stored.name, stored.parameter.removesuffix(".weight"))


def _of_first(stored: Sequence[str]) -> tuple[str, str] | None:
    """Module and projection of the tensors that hold expert 0; None where one tensor holds all experts."""
    matches = [match for name in stored if (match := _OF_EXPERT.fullmatch(name)) and match["expert"] == "0"]
    return (matches[0]["module"], matches[0]["projection"]) if matches else None


def _firsts(stored: Sequence[str]) -> tuple[str, ...]:
    """Projections of expert 0, in the order of their names: gate before up, w1 before w3."""
    matches = [match for name in stored if (match := _OF_EXPERT.fullmatch(name)) and match["expert"] == "0"]
    return tuple(sorted({match["projection"] for match in matches}))


def _of_each(projections: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{{expert}}.{name}" for name in projections)
