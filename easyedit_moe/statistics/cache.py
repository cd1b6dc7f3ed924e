"""Statistics on disk: safetensors under a key that says what they are of; written atomically, verified when read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from easyedit_moe.errors import DamagedCacheError
from easyedit_moe.statistics.moments import LayerMoments
from easyedit_moe.storage.tensors import SCHEMA, check_key, digest, read_safetensors, write_safetensors


@dataclass(frozen=True)
class StatisticsKey:
    """All that a file of statistics depends on; ``tokens`` stands for how the tokenizer cuts the corpus.

    ``coverage`` is the number of tokens per expert, in multiples of h, at which collecting stopped; None took all.
    """

    fingerprint: str
    layer: int
    corpus: str
    tokens: str
    n_samples: int
    max_length: int
    dtype: str
    coverage: float | None

    def file_name(self) -> str:
        """``layer3-<hash of the key>.safetensors``."""
        return f"layer{self.layer}-{digest(asdict(self))[:16]}.safetensors"


def statistics_folder(stats_dir: str | Path, model_name: str, fingerprint: str) -> Path:
    """One folder per model: its name for people, its fingerprint for safety."""
    label = "".join(c if c.isalnum() or c in "-_." else "_" for c in Path(model_name).name) or "model"
    return Path(stats_dir) / f"{label}-{fingerprint[:16]}"


def save_moments(path: Path, key: StatisticsKey, moments: LayerMoments) -> None:
    """Write one layer's statistics atomically."""
    tensors = {"keys": moments.keys, "counts": moments.counts, "output": moments.output}
    metadata = {"schema": SCHEMA, "kind": "moments", "key": asdict(key), "num_tokens": moments.num_tokens}
    write_safetensors(path, tensors, metadata)


def load_moments(path: Path, key: StatisticsKey) -> LayerMoments:
    """Read one layer's statistics back.

    Raises:
        DamagedCacheError: truncated or corrupt file. CacheError: one whose key is not ``key`` (another model, corpus or
            setting).
    """
    tensors, metadata = read_safetensors(path, DamagedCacheError, "delete it, and it is collected anew")
    check_key(path, metadata, "moments", "file of statistics", asdict(key), "delete it, and it is collected anew")
    complete = set(tensors) == {"keys", "counts", "output"} and "num_tokens" in metadata
    if not complete or not all(torch.isfinite(tensors[name]).all() for name in ("keys", "output")):
        raise DamagedCacheError(
            f"{path} holds incomplete or non-finite statistics; delete it, and it is collected anew."
        )
    return LayerMoments(tensors["keys"], tensors["counts"], tensors["output"], int(metadata["num_tokens"]))
