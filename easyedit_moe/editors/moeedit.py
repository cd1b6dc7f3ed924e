"""MoEEdit (arXiv 2602.10965): per-expert null-space projection and randomised block coordinate descent."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from easyedit_moe.algebra.bcd import expert_orders, solve_bcd
from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.editors.prepared import Prepared
from easyedit_moe.editors.registry import register_editor
from easyedit_moe.editors.solving import SolvingEditor
from easyedit_moe.hparams import MoEEditHyperParams


@register_editor
class MoEEditEditor(SolvingEditor):
    """BCD over experts with residual spread: keys are re-collected at each layer, as in the paper."""

    method = "MoEEdit-BCD"
    hparams_class = MoEEditHyperParams

    def solve(self, keys: RoutedKeys, residual: Tensor, layer: int, prepared: Prepared) -> tuple[Any, Any]:
        hp = self.hparams
        orders = expert_orders(prepared.experts[layer], hp.num_passes, hp.seed)
        return solve_bcd(keys, residual, hp.lambda_reg, prepared.metrics[layer], orders)


apply_moeedit_to_model = MoEEditEditor.apply_to_model
