"""Which patches lie on a checkpoint: ``easyedit_moe_edits.json`` in its folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from easyedit_moe.errors import CheckpointError
from easyedit_moe.storage.schema import content_of, read_record
from easyedit_moe.storage.strict_json import read_checked_json, write_checked_json

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
    advice = "delete it if you know which patches lie here"
    content = read_checked_json(path, CheckpointError, advice)
    with content_of(path, CheckpointError, advice):
        return read_record(content, _Saved).edits


def write_history(folder: Path, edits: Iterable[Edit]) -> None:
    """Write the edits of the checkpoint in a folder, oldest first.

    Raises:
        WriteError: the file can't be written.
    """
    write_checked_json(folder / EDITS, {"schema": SCHEMA, "edits": [asdict(edit) for edit in edits]}, indent=2)


@dataclass(frozen=True)
class _Saved:
    schema: Literal[1]
    edits: list[Edit]
