"""MoE-FT-L: fine-tuning of the experts' down-projections within an L-infinity ball (arXiv 2012.00363)."""

from __future__ import annotations

from easyedit_moe.editors.moe_ft import MoEFTEditor


class MoEFTLEditor(MoEFTEditor):
    """MoE-FT under ``|W - W_0| <= norm_constraint`` for each weight, projected after each step.

    ``W_0`` are the weights before this batch of edits, as in ROME's and EasyEdit's code: several sequential batches
    together may move a weight further. The float32 masters obey the constraint; weights of a coarser dtype do so up to
    their rounding. What else differs from the original is said at `MoEFTEditor`.
    """

    method = "MoE-FT-L"


apply_moe_ft_l_to_model = MoEFTLEditor.apply_to_model
