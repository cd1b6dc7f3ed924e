"""``inspect``: what a patch or an adapter on disk says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from easyedit_moe.adapters.moe_adapter import MoEAdapter
from easyedit_moe.patches.inspection import describe
from easyedit_moe.workflow.session import read_patch


def inspect(patch: str | Path) -> dict[str, Any]:
    """As JSON: method, facts, base and parents, what is touched and how much of it, settings and size on disk.

    No model is read. The fields are those of `easyedit_moe.patches.inspection.describe`, of an adapter those of
    `MoEAdapter.describe`.

    Raises:
        PatchError, AdapterError: neither a patch nor an adapter is there.
    """
    found = read_patch(patch)
    return found.describe(patch) if isinstance(found, MoEAdapter) else describe(found, patch)
