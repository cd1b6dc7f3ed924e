"""What both kinds of patches know of themselves: what they are, on what they were made, and what was warned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from easyedit_moe.errors import PatchError
from easyedit_moe.patches.flips import CODEC
from easyedit_moe.storage.tensors import digest, read_safetensors

SCHEMA = 3
"""Since 3 a step of a patch may name an earlier one whose experts, columns and right factors are its own, too."""

READ = (2, 3)
"""Schemas of files that are read."""


@dataclass(kw_only=True)
class PatchRecord(ABC):
    """What a patch says of itself beside what it writes.

    Attributes:
        base: `easyedit_moe.moe.fingerprint.weights_fingerprint` of the model on which it was made, the state of every
            down-projection included.
        parent: ``id`` of the patch that lay on that model; None where there was none, or where nobody said.
        warnings: what was warned while it was made.
    """

    base: str = ""
    parent: str | None = None
    warnings: list[str] = field(default_factory=list)

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """What ``id`` stands for, as JSON."""

    @property
    def id(self) -> str:
        """16 hexadecimal digits of what the patch makes of what; not of its parent, its provenance or its factors."""
        return digest(self.content())[:16]

    def described(
        self, kind: str, reports: Sequence[Any], provenance: Mapping[str, Any], flips: bool
    ) -> dict[str, Any]:
        """The metadata of a file, as JSON; ``flips`` says whether it holds originals."""
        return {
            "schema": SCHEMA,
            "kind": kind,
            "id": self.id,
            "parent": self.parent,
            "base": self.base,
            **self.content(),
            "reports": [asdict(report) for report in reports],
            "warnings": list(self.warnings),
            "provenance": dict(provenance),
            **({"originals": CODEC} if flips else {}),
        }


def record_fields(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of `PatchRecord` that a file's metadata holds, reports left out; KeyError where one is missing."""
    return {
        "fingerprint": str(metadata["fingerprint"]),
        "metadata": metadata["provenance"],
        "base": str(metadata["base"]),
        "parent": metadata["parent"],
        "warnings": [str(text) for text in metadata["warnings"]],
    }


def read_patch(path: str | Path, kind: str, called: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a saved patch of one kind, which people call ``called``.

    Raises:
        PatchError: missing, truncated or corrupt file, or another kind.
    """
    tensors, metadata = read_safetensors(Path(path), PatchError, "save the patch anew")
    if metadata.get("kind") != kind or metadata.get("schema") not in READ:
        raise PatchError(f"{path} is not a {called} of schema {' or '.join(map(str, READ))}.")
    if metadata.get("originals", CODEC) != CODEC:
        raise PatchError(f"{path} holds originals as {metadata['originals']!r}; this version reads {CODEC!r}.")
    return tensors, metadata


def check_id(path: str | Path, patch: PatchRecord, metadata: Mapping[str, Any]) -> None:
    """Refuse a file whose content is not what its id stands for.

    Raises:
        PatchError: it was changed after it was saved.
    """
    if metadata.get("id") != patch.id:
        raise PatchError(
            f"{path} is damaged: its id is {metadata.get('id')}, its content's {patch.id}; save the patch anew."
        )


def split_by_number(table: Mapping[str, Any]) -> dict[int, Any]:
    """A table of JSON with whole numbers as keys again."""
    return {int(key): value for key, value in table.items()}
