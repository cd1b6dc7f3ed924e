"""The diagnosis of an edit that wrote whole tensors: by training, or by a host's own methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from easyedit_moe.editors.diagnosis import EditDiagnosis, FactDiagnosis, ParameterDiagnosis, settings_of
from easyedit_moe.editors.measuring import combined_loss, relative_update
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.moe.wrappers import own_parameters
from easyedit_moe.patches.tensors import TensorPatch


def diagnose_tensors(
    hparams: Any, model: nn.Module, facts: Sequence[FactDiagnosis], patch: TensorPatch, steps: int
) -> EditDiagnosis:
    """What training did that is written.

    Args:
        hparams: of the method.
        model: edited.
        facts: what became of each request.
        patch: the edit, applied.
        steps: updates made.
    """
    reports, known = patch.reports, own_parameters(model)
    dtypes = {str(known[report.name].dtype).removeprefix("torch.") for report in reports}
    return EditDiagnosis(
        hparams.alg_name,
        tuple(facts),
        parameters=tuple(ParameterDiagnosis(r.name, r.relative_size, r.rounding_loss) for r in reports),
        dtype=", ".join(sorted(dtypes)) or None,
        changed=bool(patch.values),
        rounding_loss=combined_loss([(r.rounding_loss, r.update_norm) for r in reports]),
        steps=steps,
        settings=settings_of(hparams),
    )


def diagnose_host(
    method: str, facts: Sequence[EditRequest], model: nn.Module, originals: Mapping[str, Tensor]
) -> EditDiagnosis:
    """What is known of an edit by other code: how far each parameter moved from its original."""
    parameters = [
        ParameterDiagnosis(name, relative_update(model.get_parameter(name), original), None)
        for name, original in originals.items()
    ]
    told = [FactDiagnosis(fact.prompt, fact.target_new, None, None, None, None) for fact in facts]
    changed = any(one.relative_update != 0 for one in parameters) if parameters else None
    return EditDiagnosis(method, tuple(told), parameters=tuple(parameters), changed=changed)
