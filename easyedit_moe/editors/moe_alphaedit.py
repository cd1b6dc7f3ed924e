"""MoE-AlphaEdit: AlphaEdit's objective lifted to experts."""

from __future__ import annotations

from easyedit_moe.editors.global_ import GlobalEditor


class MoEAlphaEditEditor(GlobalEditor):
    """Null-space metric, and the keys of earlier edits kept as columns with zero residual."""

    method = "MoE-AlphaEdit"


apply_moe_alphaedit_to_model = MoEAlphaEditEditor.apply_to_model
