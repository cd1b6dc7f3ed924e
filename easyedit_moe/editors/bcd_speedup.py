"""BCD+speedup (arXiv 2605.16686, table 2): MoEEdit's solver, solved once at the last layer and spread."""

from __future__ import annotations

from easyedit_moe.editors.moeedit import MoEEditEditor


class BCDSpeedupEditor(MoEEditEditor):
    """Each layer gets the last layer's update, divided by the layers left (paper eq. 14)."""

    method = "BCD+speedup"


apply_bcd_speedup_to_model = BCDSpeedupEditor.apply_to_model
