"""Tucker bases of the critical layers: from the cache where they are there, computed where not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyedit_moe.algebra.ranks import resolve_rank
from easyedit_moe.algebra.tucker import TuckerBasis, tucker_basis
from easyedit_moe.errors import DamagedCacheError
from easyedit_moe.hparams import MoTEHyperParams
from easyedit_moe.hparams.sites import EXPERTS, site_entry
from easyedit_moe.moe.layers import MoELayer
from easyedit_moe.statistics.cache import statistics_folder
from easyedit_moe.statistics.moments import LayerMoments
from easyedit_moe.storage.tensors import SCHEMA, check_key, digest, read_or_warn, read_safetensors, write_safetensors

_ADVICE = "delete it, and it is computed anew"
_PARTS = {"u_expert", "u_out", "u_in"}


@dataclass(frozen=True)
class BasisKey:
    """All that a file with a Tucker basis depends on.

    ``weights`` is the hash of the layer's down-projections, which the model's fingerprint leaves out; ``statistics``
    that of the moments that whiten, empty where nothing does.
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

    def content(self) -> dict[str, Any]:
        """As JSON; see `easyedit_moe.statistics.cache.StatisticsKey.content`."""
        content = {name: value for name, value in asdict(self).items() if name != "site"}
        return {**content, **site_entry(self.site)}

    def file_name(self) -> str:
        """``basis-layer3-<hash of the key>.safetensors``."""
        return f"basis-layer{self.layer}-{digest(self.content())[:16]}.safetensors"


def content_hash(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over dtype, shape and every bit of the tensors, one after the other."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        data = tensor.detach().contiguous().cpu()
        state.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def basis_key(
    moe: MoELayer, hparams: MoTEHyperParams, whitening_moments: Sequence[Tensor], fingerprint: str
) -> BasisKey:
    """The key of one layer's basis under these hparams; ``whitening_moments`` are the second moments that whiten.

    Raises:
        HyperParamsError: a rank out of range.
    """
    layout, hp = moe.experts.layout, hparams
    ranks = (
        resolve_rank(hp.expert_rank, layout.num_experts, "rank_expert"),
        resolve_rank(hp.rank_out, layout.d_model, "rank_out"),
        resolve_rank(hp.rank_in, layout.d_hidden, "rank_in"),
    )
    return BasisKey(
        fingerprint, moe.index, content_hash(moe.experts.matrices()), ranks, hp.whitening, hp.whitening_eps,
        hp.hooi_sweeps, content_hash(whitening_moments) if whitening_moments else "", hp.site,
    )  # fmt: skip


def layer_basis(moe: MoELayer, hparams: MoTEHyperParams, moments: LayerMoments | None, fingerprint: str) -> TuckerBasis:
    """The Tucker basis of one layer, cached beside the statistics under ``hparams.stats_dir``.

    Raises:
        CacheError: a cached file is of another model; one that is damaged is made anew, with a warning.
        HyperParamsError, NumericalError: see `easyedit_moe.algebra.tucker.tucker_basis`.
    """
    hp = hparams
    sigma_in = moments.pooled() if moments and hp.whitening in ("in", "both") else None
    sigma_out = moments.output if moments and hp.whitening in ("out", "both") else None
    used = [sigma for sigma in (sigma_in, sigma_out) if sigma is not None]
    key = basis_key(moe, hp, used, fingerprint)
    path = statistics_folder(hp.stats_dir, hp.model_name, fingerprint) / key.file_name()
    device = next(iter(moe.experts.parameters()))[1].device
    found = read_or_warn(path, lambda file: load_basis(file, key, device))
    if found is not None:
        return found
    basis = tucker_basis(
        moe.experts.matrices(), hp.expert_rank, hp.rank_out, hp.rank_in, hp.hooi_sweeps, hp.whitening, sigma_in,
        sigma_out, hp.whitening_eps,
    )  # fmt: skip
    save_basis(path, key, basis)
    return basis


def save_basis(path: Path, key: BasisKey, basis: TuckerBasis) -> None:
    """Write one layer's basis atomically."""
    tensors = {"u_expert": basis.u_expert, "u_out": basis.u_out, "u_in": basis.u_in}
    metadata = {"schema": SCHEMA, "kind": "basis", "key": key.content(), "relative_error": basis.relative_error}
    write_safetensors(path, tensors, metadata)


def load_basis(path: Path, key: BasisKey, device: torch.device | str = "cpu") -> TuckerBasis:
    """Read one layer's basis back.

    Raises:
        DamagedCacheError: truncated or corrupt file. CacheError: one whose key is not ``key`` (another model,
            statistics or setting).
    """
    tensors, metadata = read_safetensors(path, DamagedCacheError, _ADVICE)
    check_key(path, metadata, "basis", "Tucker basis", key.content(), _ADVICE)
    if set(tensors) != _PARTS or not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise DamagedCacheError(f"{path} holds an incomplete or non-finite basis; {_ADVICE}.")
    parts = {name: tensor.to(device) for name, tensor in tensors.items()}
    return TuckerBasis(**parts, relative_error=float(metadata["relative_error"]))
