"""MoE-ROME: ROME's rank-one update lifted to experts."""

from __future__ import annotations

from easyedit_moe.editors.global_ import GlobalEditor


class MoEROMEEditor(GlobalEditor):
    """Covariance metric, one edit at a time, one layer; ROME's equality is the limit of ``lambda_reg`` to 0."""

    method = "MoE-ROME"


apply_moe_rome_to_model = MoEROMEEditor.apply_to_model
