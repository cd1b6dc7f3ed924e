"""What defines each method: settings of a solver that an hparams file may not contradict."""

from __future__ import annotations

from typing import Any

from easyedit_moe.errors import MethodError, did_you_mean

METHODS: dict[str, dict[str, Any]] = {
    "MoTE": {},
    "MoEEdit-BCD": {"spread": "residual"},
    "BCD+speedup": {"spread": "update"},
    "Global": {"spread": "residual"},
    "Global+speedup": {"spread": "update"},
    "MoE-MEMIT": {"metric": "covariance", "spread": "residual"},
    "MoE-AlphaEdit": {"metric": "nullspace", "spread": "residual", "remember_edits": True},
    "MoE-ROME": {"metric": "covariance", "spread": "residual", "edits_per_solve": 1, "max_layers": 1},
    "MoE-FT": {"norm_constraint": None},
    "MoE-FT-L": {},
    "MoE-LoRA": {},
    "AdaLoRA": {},
    "UnKE": {},
    "MEMoE": {},
}

ALIASES = {"MoEEdit": "MoEEdit-BCD"}


def canonical_name(name: str) -> str:
    """The method's own name, aliases resolved.

    Raises:
        MethodError: unknown; the message names the nearest method.
    """
    resolved = ALIASES.get(name, name)
    if resolved not in METHODS:
        hint = did_you_mean(name, [*METHODS, *ALIASES])
        raise MethodError(f"Unknown method {name!r}.{hint} Known: {', '.join(METHODS)}.")
    return resolved
