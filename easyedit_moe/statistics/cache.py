"""Statistics on disk: safetensors under a key that says what they are of; written atomically, verified when read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from easyedit_moe.errors import DamagedCacheError
from easyedit_moe.hparams.sites import EXPERTS, key_content
from easyedit_moe.moe.experts import ExpertLayout
from easyedit_moe.statistics.moments import LayerMoments
from easyedit_moe.storage.schema import Described, Expected, check_tensors, content_of, read_record
from easyedit_moe.storage.strict_json import digest
from easyedit_moe.storage.tensors import SCHEMA, check_key, read_safetensors, write_safetensors

_ADVICE = "delete it, and it is collected anew"


@dataclass(frozen=True)
class StatisticsKey:
    """All that a file of statistics depends on; ``tokens`` stands for how the tokenizer cuts the corpus.

    ``coverage`` is the number of tokens per expert, in multiples of h, at which collecting stopped; None took all.
    ``site`` is where the keys come to.
    """

    fingerprint: str
    layer: int
    corpus: str
    tokens: str
    n_samples: int
    max_length: int
    dtype: str
    coverage: float | None
    site: str = EXPERTS

    def content(self) -> dict[str, Any]:
        """As JSON; of routed experts as it was before there were other sites, so that what is cached stays."""
        return key_content(asdict(self))

    def file_name(self) -> str:
        """``layer3-<hash of the key>.safetensors``."""
        return f"layer{self.layer}-{digest(self.content())[:16]}.safetensors"


def statistics_folder(stats_dir: str | Path, model_name: str, fingerprint: str) -> Path:
    """One folder per model: its name for people, its fingerprint for safety."""
    label = "".join(c if c.isalnum() or c in "-_." else "_" for c in Path(model_name).name) or "model"
    return Path(stats_dir) / f"{label}-{fingerprint[:16]}"


def save_moments(path: Path, key: StatisticsKey, moments: LayerMoments) -> None:
    """Write one layer's statistics atomically."""
    tensors = {"keys": moments.keys, "counts": moments.counts, "output": moments.output}
    metadata = {"schema": SCHEMA, "kind": "moments", "key": key.content(), "num_tokens": moments.num_tokens}
    write_safetensors(path, tensors, metadata)


@dataclass(frozen=True)
class _Described(Described):
    num_tokens: int


def load_moments(path: Path, key: StatisticsKey, layout: ExpertLayout | None = None) -> LayerMoments:
    """Read one layer's statistics back.

    Args:
        path: of the file.
        key: what it must be of.
        layout: of the layer's experts, which the shapes must fit; None: they need only fit one another.

    Raises:
        DamagedCacheError: a file that is truncated or corrupt, or holds other tensors or metadata than statistics have.
            CacheError: one whose key is not ``key`` (another model, corpus or setting).
    """
    tensors, metadata = read_safetensors(path, DamagedCacheError, _ADVICE)
    check_key(path, metadata, "moments", "file of statistics", key.content(), _ADVICE)
    dtype = (getattr(torch, key.dtype),)
    count, d, h = ("E", "d", "h") if layout is None else (layout.num_experts, layout.d_model, layout.d_hidden)
    with content_of(path, DamagedCacheError, _ADVICE):
        described = read_record(metadata, _Described)
        expected = {
            "keys": Expected((count, h, h), dtype),
            "counts": Expected((count,), (torch.int64,)),
            "output": Expected((d, d), dtype),
        }
        check_tensors(tensors, expected)
        if described.num_tokens < 1 or bool((tensors["counts"] < 0).any()):
            raise ValueError("it counts fewer tokens than none")
    return LayerMoments(tensors["keys"], tensors["counts"], tensors["output"], described.num_tokens)
