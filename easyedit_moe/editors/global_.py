"""Global: the exact minimiser of MoEEdit's objective. Ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from easyedit_moe.algebra.coordinates import ExpertCoordinates
from easyedit_moe.algebra.exact import solve_exact, solve_exact_held
from easyedit_moe.algebra.held import HeldSystem
from easyedit_moe.algebra.routed_keys import FactoredUpdate, RoutedKeys
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

    def coordinates(self, keys: RoutedKeys, prepared: PreparedLayer) -> ExpertCoordinates | None:
        """Each expert's, unless a subclass solves in another way."""
        if type(self).solve is not GlobalEditor.solve:
            return None
        return ExpertCoordinates(prepared.metric, prepared.num_experts, keys.d_hidden, keys.key.device)

    def solve_reduced(
        self, keys: RoutedKeys, residual: Tensor, system: HeldSystem, coordinates: ExpertCoordinates
    ) -> FactoredUpdate:
        """The exact minimiser of all rows."""
        return solve_exact_held(keys, residual, system, coordinates)


apply_global_to_model = GlobalEditor.apply_to_model
