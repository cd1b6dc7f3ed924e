"""Statistics on disk: safetensors under a key that says what they are of; written atomically, verified when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from easyedit_moe.errors import CacheError
from easyedit_moe.files import replacing
from easyedit_moe.layers import MoELayerView
from easyedit_moe.moments import LayerMoments

SCHEMA = 1
_SAMPLES_PER_PARAMETER = 1024


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


def model_fingerprint(view: MoELayerView, without: Iterable[str] = ()) -> str:
    """SHA-256 over class, shapes, dtypes and a strided sample of every parameter except the down-projections.

    What an edit writes is left out, so that the fingerprint is that of the unedited model before and after it; where
    that is more than down-projections, ``without`` names the other parameters.
    """
    skip = {name for moe in view.layers.values() for name in moe.parameter_names()} | set(without)
    state = hashlib.sha256(type(view.model).__name__.encode())
    for name, parameter in view.model.named_parameters():
        state.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        if name in skip or parameter.is_meta:
            continue
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES_PER_PARAMETER)]
        state.update(sample.float().cpu().numpy().tobytes())
    return state.hexdigest()


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
        CacheError: truncated or corrupt file, or one whose key is not ``key`` (another model, corpus or setting).
    """
    tensors, metadata = read_safetensors(path, CacheError, "delete it, and it is collected anew")
    check_key(path, metadata, "moments", "file of statistics", asdict(key), "delete it, and it is collected anew")
    complete = set(tensors) == {"keys", "counts", "output"} and "num_tokens" in metadata
    if not complete or not all(torch.isfinite(tensors[name]).all() for name in ("keys", "output")):
        raise CacheError(f"{path} holds incomplete or non-finite statistics; delete it, and it is collected anew.")
    return LayerMoments(tensors["keys"], tensors["counts"], tensors["output"], int(metadata["num_tokens"]))


def check_key(
    path: Path, metadata: Mapping[str, Any], kind: str, name: str, key: Mapping[str, Any], advice: str
) -> None:
    """Refuse a file of another kind, or one whose key is not ``key``; ``name`` is what people call the kind.

    Raises:
        CacheError: it is not a file of this kind and schema, or was made for another model or setting.
    """
    found = metadata.get("key")
    if metadata.get("kind") != kind or metadata.get("schema") != SCHEMA or not isinstance(found, dict):
        raise CacheError(f"{path} is not a {name} of schema {SCHEMA}; {advice}.")
    wanted = json.loads(json.dumps(key))  # as the file has it: lists for tuples
    differing = [f"{k}: expected {v!r}, found {found.get(k)!r}" for k, v in wanted.items() if found.get(k) != v]
    if differing:
        raise CacheError(
            f"{path} was made for another model or setting ({'; '.join(differing)}). Delete it, or use another "
            "stats_dir."
        )


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file in full or not at all; ``metadata`` must be JSON and is kept under one entry."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        save_file(ready, partial, metadata={"easyedit_moe": json.dumps(metadata, sort_keys=True)})


def read_safetensors(path: Path, error: type[Exception], advice: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file of ours.

    Raises:
        ``error``: the file is missing, truncated, corrupt or not ours.
    """
    if not path.is_file():
        raise error(f"{path} does not exist.")
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})["easyedit_moe"])
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, ValueError, KeyError, OSError) as cause:
        raise error(f"{path} is truncated, corrupt or not of this package ({cause}); {advice}.") from cause
    return tensors, metadata


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
