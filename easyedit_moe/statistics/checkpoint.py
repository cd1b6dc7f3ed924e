"""Sums of a run of statistics that is under way, on disk: an interrupted run goes on after its last kept round."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyedit_moe.errors import CacheError, DamagedCacheError
from easyedit_moe.statistics.cache import StatisticsKey
from easyedit_moe.statistics.distributed import from_first_process, least_over_processes, rank_and_size
from easyedit_moe.storage.tensors import SCHEMA, digest, read_or_warn, read_safetensors, write_safetensors

if TYPE_CHECKING:
    from easyedit_moe.statistics.moments import Sums

_ADVICE = "delete it, and collecting starts anew"


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
        path = found[number]
        read = read_or_warn(path, lambda file: read_safetensors(file, DamagedCacheError, _ADVICE))
        if least_over_processes(int(read is not None)) == 0 or read is None:
            return 0, []
        tensors, metadata = read
        own = {f"{layer}.{name}": value for layer, one in sums.items() for name, value in one.tensors().items()}
        fits = metadata.get("kind") == "partial moments" and metadata.get("key") == self.key
        same = fits and {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
            n: (t.shape, t.dtype) for n, t in own.items()
        }
        if not same:
            raise CacheError(f"{path} holds sums of another run; {_ADVICE}.")
        for name, value in own.items():
            value.copy_(tensors[name])
        return number, list(metadata["done"])

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
            path.unlink(missing_ok=True)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Delete this process's files; what they led to is stored."""
        for path in self._rounds().values():
            path.unlink(missing_ok=True)

    def _rounds(self) -> dict[int, Path]:
        files = self.folder.glob(f"{self.stem}*.safetensors")
        return {int(path.stem[len(self.stem) :]): path for path in files}
