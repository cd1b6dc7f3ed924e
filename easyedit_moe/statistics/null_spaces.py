"""Null spaces of the critical layers: from the cache where they are there, computed where not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from easyedit_moe.algebra.nullspace import ExpertProjector, NullSpace, null_space
from easyedit_moe.errors import DamagedCacheError
from easyedit_moe.hparams import SolverHyperParams
from easyedit_moe.hparams.sites import EXPERTS, key_content
from easyedit_moe.statistics.cache import statistics_folder
from easyedit_moe.statistics.moments import LayerMoments
from easyedit_moe.storage.checksums import checksums
from easyedit_moe.storage.files import check_writable
from easyedit_moe.storage.schema import Described, Expected, check_tensors, content_of, read_record
from easyedit_moe.storage.strict_json import digest
from easyedit_moe.storage.tensors import SCHEMA, check_key, read_or_warn, read_safetensors, write_safetensors

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
        return key_content(asdict(self))

    def file_name(self) -> str:
        """``nullspace-layer3-<hash of the key>.safetensors``."""
        return f"nullspace-layer{self.layer}-{digest(self.content())[:16]}.safetensors"


def layer_null_space(layer: int, moments: LayerMoments, hparams: SolverHyperParams, fingerprint: str) -> NullSpace:
    """The projectors of one layer, cached beside the statistics under ``hparams.stats_dir``.

    Raises:
        CacheError: a cached file is of other statistics; one that is damaged is made anew, with a warning.
        WriteError: nothing can be written there. HyperParamsError, NumericalError: see
            `easyedit_moe.algebra.nullspace.null_space`.
    """
    hp, key = hparams, NullSpaceKey.of(layer, moments, hparams)
    path = statistics_folder(hp.stats_dir, hp.model_name, fingerprint) / key.file_name()
    shape = len(moments.keys), moments.keys.shape[-1]
    found = read_or_warn(path, lambda file: load_null_space(file, key, moments.keys.device, shape))
    if found is not None:
        return found
    check_writable(path)
    made = null_space_of(moments, hp)
    save_null_space(path, key, made)
    return made


def null_space_of(moments: LayerMoments, hparams: SolverHyperParams) -> NullSpace:
    """The projectors by these hparams, from no cache; raises as `easyedit_moe.algebra.nullspace.null_space`."""
    hp = hparams
    return null_space(
        moments.keys, moments.counts, hp.nullspace_threshold, hp.nullspace_relative, hp.min_coverage,
        hp.low_coverage, hp.nullspace_energy, hp.nullspace_rank,
    )  # fmt: skip


def save_null_space(path: Path, key: NullSpaceKey, space: NullSpace) -> None:
    """Write one layer's projectors atomically; bases as they are, float64."""
    parts = space.projectors
    tensors = {
        "bases": torch.cat([part.basis.cpu() for part in parts], dim=1),
        "sizes": torch.tensor([part.basis.shape[1] for part in parts]),
        "complement": torch.tensor([part.complement for part in parts]),
    }
    write_safetensors(path, tensors, {"schema": SCHEMA, "kind": "null space", "key": key.content()})


def load_null_space(
    path: Path, key: NullSpaceKey, device: torch.device | str = "cpu", shape: tuple[int | str, int | str] = ("E", "h")
) -> NullSpace:
    """Read one layer's projectors back.

    Args:
        path: of the file.
        key: what it must be of.
        device: where they go.
        shape: experts and key width (E, h) that the tensors must fit; letters: any.

    Raises:
        DamagedCacheError: a file that is truncated or corrupt, or holds other tensors or metadata than null spaces
            have. CacheError: one whose key is not ``key``.
    """
    tensors, metadata = read_safetensors(path, DamagedCacheError, _ADVICE)
    check_key(path, metadata, "null space", "file of null spaces", key.content(), _ADVICE)
    count, h = shape
    with content_of(path, DamagedCacheError, _ADVICE):
        read_record(metadata, Described)
        expected = {
            "bases": Expected((h, "columns"), (torch.float64,)),
            "sizes": Expected((count,), (torch.int64,)),
            "complement": Expected((count,), (torch.bool,)),
        }
        check_tensors(tensors, expected)
        bases, sizes = tensors["bases"].to(device), tensors["sizes"].tolist()
        if min(sizes) < 0 or max(sizes) > len(bases) or sum(sizes) != bases.shape[1]:
            raise ValueError("its bases are not as wide as its sizes say")
    flags = tensors["complement"].tolist()
    parts = zip(bases.split(sizes, dim=1), flags, strict=True)
    return NullSpace(tuple(ExpertProjector(basis, flag) for basis, flag in parts))
