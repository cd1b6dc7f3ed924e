"""AdaLoRA (arXiv 2303.10512) by peft: adapters in SVD form with a budget of rank, beside the experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from easyedit_moe.editors.moe_lora import PeftEditor, adapters_of
from easyedit_moe.editors.trainable import check_writable
from easyedit_moe.editors.training import Masters, Step, TrainingJob
from easyedit_moe.editors.training_planner import Trained
from easyedit_moe.errors import LayerError
from easyedit_moe.hparams import LoRAHyperParams
from easyedit_moe.moe.layers import DecoderLayer, MoELayer, MoELayerView


class AdaLoRAEditor(PeftEditor):
    """AdaLoRA on the linear layers of any decoder layers, beside their MoE blocks, merged after training.

    It is a baseline on a dense site: peft's AdaLoRA knows linear layers only, not packed experts. Of a MoE layer these
    are its attention projections, of a dense one its feed-forward network's as well. Where it differs from
    EasyEdit's AdaLoRA: that never calls ``update_and_allocate``, so ranks stay at peft's initial 12; here they start at
    1.5 ``rank`` (as the AdaLoRA paper does) and are cut to ``rank`` on average over a schedule of ``total_step`` steps,
    the first tenth and the last third without cuts. Training that stops early may stop before all cuts. EasyEdit adapts
    every layer, with dropout 0.1; here it is ``layers``, without dropout.
    """

    method = "AdaLoRA"

    @classmethod
    def editable_layers(cls, view: MoELayerView) -> list[int]:
        """See `Editor.editable_layers`: all that have a linear layer beside the experts, dense ones included."""
        return [one.index for one in view.decoder(range(view.num_layers)) if linear_layers(one, [])]

    @classmethod
    def check_layers(cls, hparams: LoRAHyperParams, view: MoELayerView) -> None:
        """See `Editor.check_layers`: each must have something to adapt, and hold its weights."""
        modules = _adapted_modules(view, hparams)
        if not view.without_weights:
            check_writable({f"{name}.weight": module.get_parameter("weight") for name, module in modules.items()})

    @classmethod
    def trained(cls, hparams: LoRAHyperParams, view: MoELayerView) -> Trained:
        """Adapters at their initial rank, 1.5 ``rank``; of each number its importance, its mean and its deviation."""
        weights = [module.get_parameter("weight") for module in _adapted_modules(view, hparams).values()]
        return adapters_of(
            [tuple(w.shape) for w in weights], _initial_rank(hparams), Trained.of(weights), full=False, state=4 * 4
        )

    def config(self, peft: Any, view: MoELayerView, job: TrainingJob) -> Any:
        """AdaLoRA on the linear layers beside the MoE blocks, with its schedule of ranks."""
        hp, steps = self.hparams, job.total_steps
        return peft.AdaLoraConfig(
            target_r=hp.rank, init_r=_initial_rank(hp), lora_alpha=hp.lora_alpha, lora_dropout=0.0,
            target_modules=list(_adapted_modules(view, hp)), total_step=steps, tinit=steps // 10, tfinal=steps // 3,
            orth_reg_weight=hp.orth_reg_weight,
        )  # fmt: skip

    def hooks(self, wrapped: nn.Module, masters: Masters) -> tuple[Callable[[Step], None], Callable[[], Tensor] | None]:
        """Ranks are cut after each step; the loss gets the orthogonality term."""
        tuner: Any = wrapped.base_model
        weight = self.hparams.orth_reg_weight
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


def _initial_rank(hparams: LoRAHyperParams) -> int:
    return -(-3 * hparams.rank // 2)


def _adapted_modules(view: MoELayerView, hparams: LoRAHyperParams) -> dict[str, nn.Linear]:
    """The linear layers that get adapters, by full name; LayerError where a layer has none."""
    modules: dict[str, nn.Linear] = {}
    for layer in view.decoder(hparams.layers):
        found = linear_layers(layer, hparams.target_modules)
        if not found:
            wanted = ", ".join(hparams.target_modules) or "linear layer"
            where = " beside its MoE block" if isinstance(layer, MoELayer) else ""
            raise LayerError(
                f"Layer {layer.index} ({layer.name}) has no {wanted}{where} for AdaLoRA to adapt. Choose other layers "
                "or target_modules."
            )
        modules |= found
    return modules


def linear_layers(layer: DecoderLayer, names: list[str]) -> dict[str, nn.Linear]:
    """Linear layers of a decoder layer outside its MoE block, by full name; those called one of ``names`` if given."""
    inside: set[int] = set()
    if isinstance(layer, MoELayer):
        inside = {id(module) for module in layer.block.modules()} if layer.block is not layer.layer else set()
        inside |= {id(module) for module in layer.experts.module.modules()}
    return {
        name: module
        for name, module in layer.layer.named_modules(prefix=layer.name)
        if isinstance(module, nn.Linear)
        and id(module) not in inside
        and (not names or name.rpartition(".")[2] in names)
    }


def _distance_from_orthogonal(rows: Tensor) -> Tensor:
    return torch.linalg.norm(rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))


apply_adalora_to_model = AdaLoRAEditor.apply_to_model
