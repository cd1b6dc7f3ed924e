"""Sums of a run of statistics that is under way, on disk: an interrupted run goes on after its last kept round."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from easyedit_moe.errors import CacheError, DamagedCacheError
from easyedit_moe.statistics.cache import StatisticsKey
from easyedit_moe.statistics.distributed import from_first_process, least_over_processes, rank_and_size
from easyedit_moe.storage.files import discard
from easyedit_moe.storage.schema import Expected, check_tensors, content_of, read_record
from easyedit_moe.storage.strict_json import digest
from easyedit_moe.storage.tensors import SCHEMA, read_or_warn, read_safetensors, write_safetensors

if TYPE_CHECKING:
    from easyedit_moe.statistics.moments import Sums

_ADVICE = "delete it, and collecting starts anew"


@dataclass(frozen=True)
class _Described:
    schema: Literal[1]
    kind: Literal["partial moments"]
    key: dict[str, Any]
    done: list[int]


class MomentsCheckpoint:
    """One file per process and round. The file of the round before goes once every process has written the next, so
    that all processes of a later run find a round that they have in common.

    Args:
        folder: beside the finished statistics.
        keys: what is collected; a run for anything else does not see these files.
        seconds: least time between two writes.
    """

    def __init__(self, folder: Path, keys: Mapping[int, StatisticsKey], seconds: float = 60.0) -> None:
        self.folder, self.seconds = folder, seconds
        self.rank, self.size = rank_and_size()
        self.key: dict[str, Any] = {"layers": [keys[layer].content() for layer in sorted(keys)], "processes": self.size}
        self.stem = f"partial-{digest(self.key)[:16]}-{self.rank}of{self.size}-round"
        self._written = time.monotonic()

    def resume(self, sums: dict[int, Sums]) -> tuple[int, list[int]]:
        """Fill ``sums`` from the last round that all processes have; its number (0 for none), and the layers done.

        Raises:
            CacheError: a file of another run; one that is damaged does not count, with a warning.
        """
        found = self._rounds()
        number = least_over_processes(max(found, default=0))
        if least_over_processes(int(number in found)) == 0:
            return 0, []
        own = {f"{layer}.{name}": value for layer, one in sums.items() for name, value in one.tensors().items()}
        read = read_or_warn(found[number], lambda file: self._read(file, own))
        if least_over_processes(int(read is not None)) == 0 or read is None:
            return 0, []
        tensors, done = read
        for name, value in own.items():
            value.copy_(tensors[name])
        return number, [layer for layer in sums if layer in done]

    def _read(self, path: Path, own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[int]]:
        tensors, metadata = read_safetensors(path, DamagedCacheError, _ADVICE)
        with content_of(path, DamagedCacheError, _ADVICE):
            described = read_record(metadata, _Described)
            if json.dumps(described.key, sort_keys=True) != json.dumps(self.key, sort_keys=True):
                raise CacheError(f"{path} holds sums of another run; {_ADVICE}.")
            check_tensors(tensors, {name: Expected(tuple(t.shape), (t.dtype,)) for name, t in own.items()})
            if any(int(t.min()) < 0 for t in tensors.values() if t.dtype == torch.int64):
                raise ValueError("it counts fewer tokens than none")
        return tensors, described.done

    def keep(self, sums: dict[int, Sums], round_number: int, done: Sequence[int]) -> None:
        """Write the sums before ``round_number``, unless the last write was less than ``seconds`` ago."""
        due = time.monotonic() - self._written >= self.seconds
        if not from_first_process(int(due)):
            return
        tensors = {f"{layer}.{name}": value for layer, one in sums.items() for name, value in one.tensors().items()}
        metadata = {"schema": SCHEMA, "kind": "partial moments", "key": self.key, "done": list(done)}
        older = self._rounds()
        write_safetensors(self.folder / f"{self.stem}{round_number}.safetensors", tensors, metadata)
        least_over_processes(0)  # all have written
        for path in older.values():
            discard(path)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Delete this process's files; what they led to is stored."""
        for path in self._rounds().values():
            discard(path)

    def _rounds(self) -> dict[int, Path]:
        files = self.folder.glob(f"{self.stem}*.safetensors")
        return {int(path.stem[len(self.stem) :]): path for path in files}
