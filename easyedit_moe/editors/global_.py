"""Global: the exact minimiser of MoEEdit's objective. Ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from easyedit_moe.algebra.coordinates import ExpertCoordinates
from easyedit_moe.algebra.exact import solve_exact, solve_exact_held
from easyedit_moe.algebra.held import ridge_suffices
from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.editors.memory import Row
from easyedit_moe.editors.prepared import PreparedLayer
from easyedit_moe.editors.solving import SolvingEditor
from easyedit_moe.hparams import GlobalHyperParams


class GlobalEditor(SolvingEditor):
    """One T x T system per layer instead of sweeps over experts."""

    method = "Global"
    hparams: GlobalHyperParams

    def solve(self, keys: RoutedKeys, residual: Tensor, prepared: PreparedLayer, lambda_reg: float) -> tuple[Any, Any]:
        """The exact minimiser."""
        return solve_exact(keys, residual, lambda_reg, prepared.metric), None

    def solve_beside(
        self,
        layer: int,
        held: Mapping[Row, RoutedKeys],
        keys: RoutedKeys,
        residual: Tensor,
        prepared: PreparedLayer,
        lambda_reg: float,
    ) -> tuple[Any, Any]:
        """The exact minimiser of all rows, by the reduced system of the new ones."""
        coordinates = ExpertCoordinates(prepared.metric, prepared.num_experts, keys.d_hidden, keys.key.device)
        own = type(self).solve is GlobalEditor.solve
        if not held or not own or not ridge_suffices(keys, coordinates, lambda_reg):
            return super().solve_beside(layer, held, keys, residual, prepared, lambda_reg)
        system = self.holding.system(layer, prepared, held, coordinates, lambda_reg)
        return solve_exact_held(keys, residual, system, coordinates), None


apply_global_to_model = GlobalEditor.apply_to_model
