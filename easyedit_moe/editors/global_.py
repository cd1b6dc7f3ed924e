"""Global: the exact minimiser of MoEEdit's objective. Ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from easyedit_moe.algebra.exact import solve_exact
from easyedit_moe.algebra.routed_keys import RoutedKeys
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


apply_global_to_model = GlobalEditor.apply_to_model
