"""Values over values: what is given later counts more, and replaces what it excludes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_RANKS = ("rank_expert", "rank_out", "rank_in")
REPLACES: Mapping[str, tuple[str, ...]] = {
    "lambda_reg": ("lambda_relative",),
    "lambda_relative": ("lambda_reg",),
    "nullspace_threshold": ("nullspace_energy", "nullspace_rank"),
    "nullspace_energy": ("nullspace_threshold", "nullspace_relative", "nullspace_rank"),
    "nullspace_rank": ("nullspace_threshold", "nullspace_relative", "nullspace_energy"),
    "tucker_energy": _RANKS,
    **dict.fromkeys(_RANKS, ("tucker_energy",)),
}
"""Setting -> the other ways of saying the same thing."""


def overlaid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over``; a setting of ``over`` that is not None removes what it excludes from
    ``base``. What ``over`` itself gives twice is left, to be refused.
    """
    replaced = {other for name, value in over.items() if value is not None for other in REPLACES.get(name, ())}
    return {**{name: value for name, value in base.items() if name not in replaced}, **over}
