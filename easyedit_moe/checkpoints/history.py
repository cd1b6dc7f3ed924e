"""Which patches lie on a checkpoint: ``easyedit_moe_edits.json`` in its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from easyedit_moe.checkpoints.shards import read_json
from easyedit_moe.errors import CheckpointError

EDITS = "easyedit_moe_edits.json"
SCHEMA = 1


@dataclass(frozen=True)
class Edit:
    """One patch on a checkpoint.

    Attributes:
        id, parent: of the patch.
        method: that made it; an empty string where the patch does not say.
        own: for each matrix that this machine rounded differently from the one that made the patch, the checksum in
            the patch and that of what was written.
    """

    id: str
    parent: str | None
    method: str = ""
    own: dict[str, tuple[int, int]] = field(default_factory=dict)


def read_history(folder: Path) -> list[Edit]:
    """The edits in a checkpoint's folder, oldest first; none where it was never edited.

    Raises:
        CheckpointError: the file is there but unreadable.
    """
    path = folder / EDITS
    if not os.path.exists(path):
        return []
    content = read_json(path)
    try:
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}")
        return [_edit(entry) for entry in content["edits"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it if you know which patches lie here.") from error


def history_text(edits: Iterable[Edit]) -> str:
    """The content of the file."""
    return json.dumps({"schema": SCHEMA, "edits": [asdict(edit) for edit in edits]}, indent=2) + "\n"


def _edit(entry: dict[str, Any]) -> Edit:
    own = {key: (int(recorded), int(found)) for key, (recorded, found) in entry["own"].items()}
    return Edit(str(entry["id"]), entry["parent"], str(entry["method"]), own)
