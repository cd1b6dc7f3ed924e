"""Null spaces of the critical layers: from the cache where they are there, computed where not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from easyedit_moe.algebra.nullspace import ExpertProjector, NullSpace, null_space
from easyedit_moe.errors import DamagedCacheError
from easyedit_moe.hparams import SolverHyperParams
from easyedit_moe.hparams.sites import EXPERTS, site_entry
from easyedit_moe.statistics.cache import statistics_folder
from easyedit_moe.statistics.moments import LayerMoments
from easyedit_moe.storage.checksums import checksums
from easyedit_moe.storage.tensors import SCHEMA, check_key, digest, read_or_warn, read_safetensors, write_safetensors

_ADVICE = "delete it, and it is computed anew"


@dataclass(frozen=True)
class NullSpaceKey:
    """All that a file with a layer's null spaces depends on; ``statistics`` is a hash of its second moments' bits and
    counts, the others are hyper-parameters. Methods that agree in them share the file.
    """

    layer: int
    statistics: str
    threshold: float | None
    relative: bool
    energy: float | None
    rank: int | float | None
    min_coverage: int
    low_coverage: str
    site: str = EXPERTS

    @staticmethod
    def of(layer: int, moments: LayerMoments, hparams: SolverHyperParams) -> NullSpaceKey:
        """Of one layer under these hparams; what they do not use is left out."""
        hp = hparams
        own = hp.low_coverage == "keep"  # then coverage decides nothing
        told = [checksums(moments.keys), [] if own else moments.counts.tolist()]
        return NullSpaceKey(
            layer, digest([*told, list(moments.keys.shape), str(moments.keys.dtype)]), hp.nullspace_threshold,
            hp.nullspace_relative, hp.nullspace_energy, hp.nullspace_rank, 0 if own else hp.min_coverage,
            hp.low_coverage, hp.site,
        )  # fmt: skip

    def content(self) -> dict[str, Any]:
        """As JSON; see `easyedit_moe.statistics.cache.StatisticsKey.content`."""
        content = {name: value for name, value in asdict(self).items() if name != "site"}
        return {**content, **site_entry(self.site)}

    def file_name(self) -> str:
        """``nullspace-layer3-<hash of the key>.safetensors``."""
        return f"nullspace-layer{self.layer}-{digest(self.content())[:16]}.safetensors"


def layer_null_space(layer: int, moments: LayerMoments, hparams: SolverHyperParams, fingerprint: str) -> NullSpace:
    """The projectors of one layer, cached beside the statistics under ``hparams.stats_dir``.

    Raises:
        CacheError: a cached file is of other statistics; one that is damaged is made anew, with a warning.
        HyperParamsError, NumericalError: see `easyedit_moe.algebra.nullspace.null_space`.
    """
    hp, key = hparams, NullSpaceKey.of(layer, moments, hparams)
    path = statistics_folder(hp.stats_dir, hp.model_name, fingerprint) / key.file_name()
    found = read_or_warn(path, lambda file: load_null_space(file, key, moments.keys.device))
    if found is not None:
        return found
    made = null_space(
        moments.keys, moments.counts, hp.nullspace_threshold, hp.nullspace_relative, hp.min_coverage,
        hp.low_coverage, hp.nullspace_energy, hp.nullspace_rank,
    )  # fmt: skip
    save_null_space(path, key, made)
    return made


def save_null_space(path: Path, key: NullSpaceKey, space: NullSpace) -> None:
    """Write one layer's projectors atomically; bases as they are, float64."""
    parts = space.projectors
    tensors = {
        "bases": torch.cat([part.basis.cpu() for part in parts], dim=1),
        "sizes": torch.tensor([part.basis.shape[1] for part in parts]),
        "complement": torch.tensor([part.complement for part in parts]),
    }
    write_safetensors(path, tensors, {"schema": SCHEMA, "kind": "null space", "key": key.content()})


def load_null_space(path: Path, key: NullSpaceKey, device: torch.device | str = "cpu") -> NullSpace:
    """Read one layer's projectors back.

    Raises:
        DamagedCacheError: truncated or corrupt file. CacheError: one whose key is not ``key``.
    """
    tensors, metadata = read_safetensors(path, DamagedCacheError, _ADVICE)
    check_key(path, metadata, "null space", "file of null spaces", key.content(), _ADVICE)
    if set(tensors) != {"bases", "sizes", "complement"} or not torch.isfinite(tensors["bases"]).all():
        raise DamagedCacheError(f"{path} holds incomplete or non-finite null spaces; {_ADVICE}.")
    bases = tensors["bases"].to(device).split(tensors["sizes"].tolist(), dim=1)
    flags = tensors["complement"].tolist()
    return NullSpace(tuple(ExpertProjector(basis, flag) for basis, flag in zip(bases, flags, strict=True)))
