"""What both kinds of patches know of themselves: what they are, on what they were made, and what was warned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from easyedit_moe.errors import PatchError
from easyedit_moe.patches.flips import CODEC
from easyedit_moe.storage.schema import content_of, read_record
from easyedit_moe.storage.strict_json import digest
from easyedit_moe.storage.tensors import read_safetensors

SCHEMA = 4
"""Since 3 a step of a patch may name an earlier one whose experts, columns and right factors are its own, too; since 4
it may be a core, and the file hold what maps it back."""

READ = (2, 3, 4)
"""Schemas of files that are read."""
ADVICE = "save the patch anew"
_Saved = TypeVar("_Saved", bound="SavedRecord")


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


@dataclass(frozen=True, kw_only=True)
class SavedRecord:
    """What the metadata of both kinds of patches hold, by name; each kind adds its own."""

    schema: int
    kind: str
    id: str
    parent: str | None
    base: str
    fingerprint: str
    warnings: list[str]
    provenance: dict[str, Any]
    originals: str | None = None

    def fields(self) -> dict[str, Any]:
        """The attributes of a patch that both kinds have, reports left out."""
        return {
            "fingerprint": self.fingerprint,
            "metadata": self.provenance,
            "base": self.base,
            "parent": self.parent,
            "warnings": self.warnings,
        }


def read_patch(path: str | Path, kind: str, called: str, record: type[_Saved]) -> tuple[dict[str, Tensor], _Saved]:
    """Tensors and metadata of a saved patch of one kind, which people call ``called``.

    Raises:
        PatchError: a file that is missing, truncated or corrupt, of another kind, or with other metadata than
            ``record`` has.
    """
    tensors, metadata = read_safetensors(Path(path), PatchError, ADVICE)
    schema = metadata.get("schema")
    if metadata.get("kind") != kind or type(schema) is not int or schema not in READ:
        raise PatchError(f"{path} is not a {called} of schema {' or '.join(map(str, READ))}.")
    with content_of(Path(path), PatchError, ADVICE):
        found = read_record(metadata, record)
    if found.originals not in (CODEC, None):
        raise PatchError(f"{path} holds originals as {found.originals!r}; this version reads {CODEC!r}.")
    return tensors, found


def check_id(patch: PatchRecord, found: SavedRecord) -> None:
    """Refuse content that is not what its id stands for.

    Raises:
        ValueError: it was changed after it was saved.
    """
    if found.id != patch.id:
        raise ValueError(f"its id is {found.id}, its content's {patch.id}")
