"""Tucker bases of the critical layers: from the cache where they are there, computed where not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyedit_moe.algebra.tucker import TuckerBasis, tucker_basis
from easyedit_moe.errors import DamagedCacheError
from easyedit_moe.hparams import MoTEHyperParams
from easyedit_moe.hparams.sites import EXPERTS, key_content
from easyedit_moe.moe.experts import ExpertLayout
from easyedit_moe.moe.layers import MoELayer
from easyedit_moe.statistics.cache import statistics_folder
from easyedit_moe.statistics.moments import LayerMoments
from easyedit_moe.storage.checksums import checksums_of
from easyedit_moe.storage.files import check_writable
from easyedit_moe.storage.schema import Described, Expected, check_tensors, content_of, read_record
from easyedit_moe.storage.strict_json import digest
from easyedit_moe.storage.tensors import SCHEMA, check_key, read_or_warn, read_safetensors, write_safetensors

_ADVICE = "delete it, and it is computed anew"
_PARTS = ("u_expert", "u_out", "u_in")


@dataclass(frozen=True)
class BasisKey:
    """All that a file with a Tucker basis depends on.

    ``ranks`` are zeros where ``energy`` chooses them. ``weights`` is the hash of the layer's down-projections, which
    the model's fingerprint leaves out; ``statistics`` that of the moments that whiten, empty where nothing does.
    """

    fingerprint: str
    layer: int
    weights: str
    ranks: tuple[int, int, int]
    whitening: str
    whitening_eps: float
    hooi_sweeps: int
    statistics: str
    site: str = EXPERTS
    energy: tuple[float, ...] = ()

    def content(self) -> dict[str, Any]:
        """As JSON; see `easyedit_moe.statistics.cache.StatisticsKey.content`. No energy leaves no trace either."""
        content = key_content(asdict(self))
        energy = content.pop("energy")
        return content | ({"energy": list(energy)} if energy else {})

    def file_name(self) -> str:
        """``basis-layer3-<hash of the key>.safetensors``."""
        return f"basis-layer{self.layer}-{digest(self.content())[:16]}.safetensors"


def content_hash(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over dtype, shape and `checksum` of each tensor, one after the other.

    The checksums are made where the tensors are: at a real shape, hashing each bit of a layer's weights takes longer
    than all else that a cached basis needs.
    """
    found = list(tensors)
    state = hashlib.sha256()
    for tensor, check in zip(found, checksums_of(found), strict=True):
        state.update(f"{tuple(tensor.shape)}{tensor.dtype}{check}".encode())
    return state.hexdigest()


def basis_key(
    moe: MoELayer, hparams: MoTEHyperParams, whitening_moments: Sequence[Tensor], fingerprint: str
) -> BasisKey:
    """The key of one layer's basis under these hparams; ``whitening_moments`` are the second moments that whiten.

    Raises:
        HyperParamsError: a rank out of range.
    """
    layout, hp = moe.experts.layout, hparams
    ranks = hp.ranks(layout.num_experts, layout.d_model, layout.d_hidden) or (0, 0, 0)
    return BasisKey(
        fingerprint, moe.index, content_hash(moe.experts.matrices()), ranks, hp.whitening, hp.whitening_eps,
        hp.hooi_sweeps, content_hash(whitening_moments) if whitening_moments else "", hp.site,
        tuple(hp.tucker_energy),
    )  # fmt: skip


def layer_basis(moe: MoELayer, hparams: MoTEHyperParams, moments: LayerMoments | None, fingerprint: str) -> TuckerBasis:
    """The Tucker basis of one layer, cached beside the statistics under ``hparams.stats_dir``.

    Raises:
        CacheError: a cached file is of another model; one that is damaged is made anew, with a warning.
        WriteError: nothing can be written there. HyperParamsError, NumericalError: see
            `easyedit_moe.algebra.tucker.tucker_basis`.
    """
    hp = hparams
    sigma_in = moments.pooled() if moments and hp.whitening in ("in", "both") else None
    sigma_out = moments.output if moments and hp.whitening in ("out", "both") else None
    used = [sigma for sigma in (sigma_in, sigma_out) if sigma is not None]
    key = basis_key(moe, hp, used, fingerprint)
    path = statistics_folder(hp.stats_dir, hp.model_name, fingerprint) / key.file_name()
    device = next(iter(moe.experts.parameters()))[1].device
    found = read_or_warn(path, lambda file: load_basis(file, key, device, moe.experts.layout))
    if found is not None:
        return found
    ranks = (1, 1, 1) if hp.tucker_energy else key.ranks
    check_writable(path)
    basis = tucker_basis(
        moe.experts.matrices(), *ranks, hp.hooi_sweeps, hp.whitening, sigma_in,
        sigma_out, hp.whitening_eps, energy=hp.tucker_energy or None,
    )  # fmt: skip
    save_basis(path, key, basis)
    return basis


def save_basis(path: Path, key: BasisKey, basis: TuckerBasis) -> None:
    """Write one layer's basis atomically."""
    tensors = {"u_expert": basis.u_expert, "u_out": basis.u_out, "u_in": basis.u_in}
    metadata = {"schema": SCHEMA, "kind": "basis", "key": key.content(), "relative_error": basis.relative_error}
    write_safetensors(path, tensors, metadata)


@dataclass(frozen=True)
class _Described(Described):
    relative_error: float


def load_basis(
    path: Path, key: BasisKey, device: torch.device | str = "cpu", layout: ExpertLayout | None = None
) -> TuckerBasis:
    """Read one layer's basis back.

    Args:
        path: of the file.
        key: what it must be of; the ranks are those of the tensors.
        device: where they go.
        layout: of the layer's experts, which the shapes must fit; None: any.

    Raises:
        DamagedCacheError: a file that is truncated or corrupt, or holds other tensors or metadata than a basis has.
            CacheError: one whose key is not ``key`` (another model, statistics or setting).
    """
    tensors, metadata = read_safetensors(path, DamagedCacheError, _ADVICE)
    check_key(path, metadata, "basis", "Tucker basis", key.content(), _ADVICE)
    count, d, h = ("E", "d", "h") if layout is None else (layout.num_experts, layout.d_model, layout.d_hidden)
    with content_of(path, DamagedCacheError, _ADVICE):
        described = read_record(metadata, _Described)
        ranks: tuple[int | str, ...] = tuple(f"rank of {n}" for n in _PARTS) if key.energy else key.ranks
        expected = {
            name: Expected((size, rank), (torch.float64,))
            for name, size, rank in zip(_PARTS, (count, d, h), ranks, strict=True)
        }
        check_tensors(tensors, expected)
    parts = {name: tensor.to(device) for name, tensor in tensors.items()}
    return TuckerBasis(**parts, relative_error=described.relative_error)
