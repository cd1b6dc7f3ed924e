"""MoE-MEMIT: MEMIT's objective lifted to experts."""

from __future__ import annotations

from easyedit_moe.editors.global_ import GlobalEditor


class MoEMEMITEditor(GlobalEditor):
    """Covariance metric with ``lambda_reg`` as MEMIT's ``mom2_update_weight``; by default residual spread."""

    method = "MoE-MEMIT"


apply_moe_memit_to_model = MoEMEMITEditor.apply_to_model
