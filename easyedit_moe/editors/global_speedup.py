"""Global+speedup (arXiv 2605.16686, section 3.1): the exact solver, solved once at the last layer and spread."""

from __future__ import annotations

from easyedit_moe.editors.global_ import GlobalEditor


class GlobalSpeedupEditor(GlobalEditor):
    """Each layer gets the last layer's update, divided by the layers left (paper eq. 14)."""

    method = "Global+speedup"


apply_global_speedup_to_model = GlobalSpeedupEditor.apply_to_model
