"""AdaLoRA (arXiv 2303.10512) by peft: adapters in SVD form with a budget of rank, beside the MoE blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from easyedit_moe.editors.moe_lora import PeftEditor
from easyedit_moe.editors.registry import register_editor
from easyedit_moe.editors.training import Masters, Step, TrainingJob, check_writable
from easyedit_moe.errors import LayerError
from easyedit_moe.moe.layers import MoELayer, MoELayerView


@register_editor
class AdaLoRAEditor(PeftEditor):
    """AdaLoRA on the attention projections of the critical layers, merged after training.

    It is a baseline on a dense site: peft's AdaLoRA knows linear layers only, not packed experts. Where it differs from
    EasyEdit's AdaLoRA: that never calls ``update_and_allocate``, so ranks stay at peft's initial 12; here they start at
    1.5 ``rank`` (as the AdaLoRA paper does) and are cut to ``rank`` on average over a schedule of ``total_step`` steps,
    the first tenth and the last third without cuts. Training that stops early may stop before all cuts. EasyEdit adapts
    every layer, with dropout 0.1; here it is ``layers``, without dropout.
    """

    method = "AdaLoRA"
    edits = "dense site"

    def config(self, peft: Any, view: MoELayerView, job: TrainingJob) -> Any:
        hp, steps = self.hparams, job.total_steps
        modules: dict[str, nn.Linear] = {}
        for moe in view.require(hp.layers):
            found = linear_layers(moe, hp.target_modules)
            if not found:
                wanted = ", ".join(hp.target_modules) or "linear layer"
                raise LayerError(
                    f"Layer {moe.index} ({moe.name}) has no {wanted} beside its MoE block for AdaLoRA to adapt. Choose "
                    "other layers or target_modules."
                )
            modules |= found
        check_writable({f"{name}.weight": module.weight for name, module in modules.items()})
        return peft.AdaLoraConfig(
            target_r=hp.rank, init_r=-(-3 * hp.rank // 2), lora_alpha=hp.lora_alpha, lora_dropout=0.0,
            target_modules=list(modules), total_step=steps, tinit=steps // 10, tfinal=steps // 3,
            orth_reg_weight=hp.orth_reg_weight,
        )  # fmt: skip

    def hooks(self, wrapped: nn.Module, masters: Masters) -> tuple[Callable[[Step], None], Callable[[], Tensor] | None]:
        tuner, weight = wrapped.base_model, self.hparams.orth_reg_weight
        left = [p.T for name, p in masters.parameters.items() if "lora_B" in name]
        right = [p for name, p in masters.parameters.items() if "lora_A" in name]

        def penalty() -> Tensor:
            """Mean over all P and Q of ``||P P^T - I||``, so that what lora_E scales are singular vectors."""
            distances = [_distance_from_orthogonal(rows) for rows in [*left, *right]]
            return weight * torch.stack([d.to(distances[0].device) for d in distances]).mean()

        def allocate(step: Step) -> None:
            # peft reads sensitivities from .grad, which training does not leave behind otherwise.
            for name, parameter in masters.parameters.items():
                parameter.grad = masters.values[name].grad
            tuner.update_and_allocate(step.number)
            for parameter in masters.parameters.values():
                parameter.grad = None
            masters.pull()

        return allocate, (penalty if weight else None)


def linear_layers(moe: MoELayer, names: list[str]) -> dict[str, nn.Linear]:
    """Linear layers of a decoder layer outside its MoE block, by full name; those called one of ``names`` if given."""
    inside = {id(module) for module in moe.block.modules()} if moe.block is not moe.layer else set()
    inside |= {id(module) for module in moe.experts.module.modules()}
    return {
        name: module
        for name, module in moe.layer.named_modules(prefix=moe.name)
        if isinstance(module, nn.Linear)
        and id(module) not in inside
        and (not names or name.rpartition(".")[2] in names)
    }


def _distance_from_orthogonal(rows: Tensor) -> Tensor:
    return torch.linalg.norm(rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))


apply_adalora_to_model = AdaLoRAEditor.apply_to_model
