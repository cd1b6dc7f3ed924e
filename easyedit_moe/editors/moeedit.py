"""MoEEdit (arXiv 2602.10965): per-expert null-space projection and randomised block coordinate descent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from easyedit_moe.algebra.bcd import expert_orders, solve_bcd
from easyedit_moe.algebra.coordinates import ExpertCoordinates
from easyedit_moe.algebra.held_bcd import solve_bcd_held
from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.editors.memory import Row, tokens_of
from easyedit_moe.editors.prepared import PreparedLayer
from easyedit_moe.editors.solving import SolvingEditor
from easyedit_moe.hparams import MoEEditHyperParams


class MoEEditEditor(SolvingEditor):
    """BCD over experts; by default keys are re-collected at each layer, as in the paper (``spread: residual``)."""

    method = "MoEEdit-BCD"
    hparams: MoEEditHyperParams

    def ridge(self, keys: RoutedKeys, prepared: PreparedLayer, edits_before: int) -> float:
        """As for all solvers; in the published code's variant it grows with the edits of earlier batches."""
        grown = 1 + edits_before / 1000 if self.hparams.variant == "code" else 1.0
        return grown * super().ridge(keys, prepared, edits_before)

    def solve(self, keys: RoutedKeys, residual: Tensor, prepared: PreparedLayer, lambda_reg: float) -> tuple[Any, Any]:
        """The update after ``num_passes`` over the experts, and the objective's way down."""
        hp = self.hparams
        orders = expert_orders(prepared.num_experts, hp.num_passes, hp.seed)
        return solve_bcd(keys, residual, lambda_reg, prepared.metric, orders)

    def solve_beside(
        self,
        layer: int,
        held: Mapping[Row, RoutedKeys],
        keys: RoutedKeys,
        residual: Tensor,
        prepared: PreparedLayer,
        lambda_reg: float,
    ) -> tuple[Any, Any]:
        """The same iterates; held rows by their second moment once there are more of them than unknowns."""
        hp = self.hparams
        coordinates = ExpertCoordinates(prepared.metric, prepared.num_experts, keys.d_hidden, keys.key.device)
        many = tokens_of(held) > coordinates.size
        if not many or type(self).solve is not MoEEditEditor.solve or not lambda_reg > 0:
            return super().solve_beside(layer, held, keys, residual, prepared, lambda_reg)
        moment = self.holding.moment(layer, prepared, held, coordinates)
        orders = expert_orders(prepared.num_experts, hp.num_passes, hp.seed)
        return solve_bcd_held(keys, residual, lambda_reg, moment, coordinates, orders)


apply_moeedit_to_model = MoEEditEditor.apply_to_model
