"""Several patches that follow each other as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from easyedit_moe.algebra.core_update import CoreUpdate, Update, joined_cores
from easyedit_moe.algebra.low_rank import low_rank
from easyedit_moe.algebra.routed_keys import FactoredUpdate
from easyedit_moe.errors import PatchError
from easyedit_moe.patches.checks import Base
from easyedit_moe.patches.flips import joined_flips
from easyedit_moe.patches.record import PatchRecord
from easyedit_moe.patches.steps import sharing_factors
from easyedit_moe.patches.tensors import TensorPatch
from easyedit_moe.patches.weights import WeightPatch


def merge(patches: Sequence[WeightPatch | TensorPatch]) -> WeightPatch | TensorPatch:
    """One patch that does what a chain of them does, in the order in which they were applied, oldest first.

    The result is exact: every step stays a step of its own and is rounded as before, so applying the one patch gives
    the bits that applying the chain gives. It holds originals if every part does (``flips``), and is applied if every
    part is. Its parent is that of the first.

    Raises:
        PatchError: no patch, both kinds, a gap in the chain or a wrong order, patches of different models or sites,
            or only some of them applied.
    """
    if patches and all(isinstance(patch, WeightPatch) for patch in patches):
        return merge_weights([patch for patch in patches if isinstance(patch, WeightPatch)])
    if patches and all(isinstance(patch, TensorPatch) for patch in patches):
        return merge_tensors([patch for patch in patches if isinstance(patch, TensorPatch)])
    if not patches:
        raise PatchError("There must be at least one patch to merge.")
    kinds = ", ".join(f"{patch.id} ({type(patch).__name__})" for patch in patches)
    raise PatchError(
        f"Factored updates and whole tensors can't be merged into one patch: found {kinds}. Merge each run of one "
        "kind, and apply the results one after the other."
    )


def merge_weights(patches: Sequence[WeightPatch]) -> WeightPatch:
    """`merge` of factored updates."""
    _check_chain(patches)
    sites = dict.fromkeys(p.site for p in patches)
    if len(sites) != 1:
        raise PatchError(
            f"Patches of different sites can't be merged into one: found {', '.join(sites)}. Merge each run of one "
            "site, and apply the results one after the other."
        )
    if len({p.fingerprint for p in patches}) != 1:
        raise PatchError(f"All patches must be of the same model; {_different(patches)}.")
    parts = [_flat(p.before, p.after, p.flips, p.originals) for p in patches]
    before, after, flips, originals = _joined(patches, parts, [p.applied for p in patches])
    written = dict(pair for p in patches for pair in _pairs(p.written))
    steps = [step for p in patches for step in p.steps]
    updates = sharing_factors([update for _, update in steps])
    return WeightPatch(
        steps=[(layer, update) for (layer, _), update in zip(steps, updates, strict=True)],
        fingerprint=patches[0].fingerprint,
        reports=[report for p in patches for report in p.reports],
        originals=_nested(originals),
        written=_nested(written) if patches[0].applied else {},
        before=_nested(before),
        after=_nested(after),
        stored={layer: stored for p in patches for layer, stored in p.stored.items()},
        flips=_nested(flips),
        site=patches[0].site,
        earlier=patches[0].earlier,
        _model=patches[-1]._model if patches[0].applied else None,
        **_record(patches),
    )


def revert_run(patches: Sequence[WeightPatch], model: nn.Module, base: Base | None = None) -> None:
    """Revert patches that follow each other, newest last, in one go; see `WeightPatch.revert`."""
    merge_weights(patches).revert(model, base)
    for patch in patches:
        patch.forget()


def folded(patch: WeightPatch) -> WeightPatch:
    """A patch with one step per layer: the factors of all its steps side by side, not applied.

    Cores of one layer are added up to one core. Where factors are more columns than the shorter side of a matrix, its
    own factors of the product's rank take their place (QR and singular values, `easyedit_moe.algebra.low_rank`). What
    is written is the same up to rounding, once rather than step by step; the checksums stay those of the steps, and so
    do originals in ``flips``, which apply the steps' very bits. ``metadata`` says that it is "folded".
    """
    updates = sharing_factors([update for _, update in patch.steps])
    pairs = [(layer, update) for (layer, _), update in zip(patch.steps, updates, strict=True)]
    steps = [(layer, _as_one([update for number, update in pairs if number == layer])) for layer in patch.layers]
    told = {**patch.metadata, "folded": True}
    return replace(patch, steps=steps, originals={}, written={}, earlier=None, metadata=told, _model=None)


def _as_one(updates: Sequence[Update]) -> Update:
    cores = [update for update in updates if isinstance(update, CoreUpdate)]
    if len(cores) == len(updates) and all(core.factors is cores[0].factors for core in cores):
        return joined_cores(cores)
    return _side_by_side([u.expanded() if isinstance(u, CoreUpdate) else u for u in updates])


def _side_by_side(updates: Sequence[FactoredUpdate]) -> FactoredUpdate:
    experts = sorted({expert for update in updates for expert in update.experts})
    lefts, columns, right, start = [], [], [], 0
    for expert in experts:
        parts = [(u, u.experts.index(expert)) for u in updates if expert in u.experts]
        left = torch.cat([u.left[:, u.columns[i]] for u, i in parts], dim=1)
        other = torch.cat([u.right[i] for u, i in parts], dim=1)
        if left.shape[1] > min(len(left), len(other)):
            b, a = low_rank(left, other)
            left, other = b.to(left.dtype), a.T.to(left.dtype).contiguous()
        lefts.append(left)
        right.append(other)
        columns.append(torch.arange(start, start + left.shape[1], device=left.device))
        start += left.shape[1]
    return FactoredUpdate(torch.cat(lefts, dim=1), tuple(experts), tuple(columns), tuple(right))


def merge_tensors(patches: Sequence[TensorPatch]) -> TensorPatch:
    """`merge` of whole tensors: of each, the last value counts."""
    _check_chain(patches)
    parts = [(p.before, p.after, p.flips, p.originals) for p in patches]
    before, after, flips, originals = _joined(patches, parts, [bool(p.originals) for p in patches])
    values = {name: value for p in patches for name, value in p.values.items()}
    return TensorPatch(
        values=values,
        before=before,
        after=after,
        fingerprint=patches[0].fingerprint,
        without=patches[0].left_out,
        reports=[report for p in patches for report in p.reports],
        originals=originals,
        flips=flips,
        **_record(patches),
    )


def _record(patches: Sequence[WeightPatch] | Sequence[TensorPatch]) -> dict[str, Any]:
    """What the merged patch says of itself."""
    parts = [part for p in patches for part in p.metadata.get("parts", [p.metadata])]
    merged = [name for p in patches for name in p.metadata.get("merged", [p.id])]
    kept = {"folded": True} if any(p.metadata.get("folded") for p in patches) else {}
    return {
        "metadata": {"parts": parts, "merged": merged, **kept},
        "base": patches[0].base,
        "parent": patches[0].parent,
        "warnings": [text for p in patches for text in p.warnings],
    }


def _check_chain(patches: Sequence[PatchRecord]) -> None:
    """Refuse an order or a gap that the parents show.

    Raises:
        PatchError: no patch, a parent that comes later, or one that is missing.
    """
    if not patches:
        raise PatchError("There must be at least one patch to merge.")
    ids = [patch.id for patch in patches]
    for i, patch in enumerate(patches):
        known = ids[:i] + [name for p in patches[:i] for name in _merged(p)]
        if patch.parent in ids[i + 1 :]:
            raise PatchError(f"Wrong order: patch {patch.id} was made on patch {patch.parent}, which comes later.")
        if i and patch.parent is not None and patch.parent not in known:
            raise PatchError(f"Patch {patch.id} was made on patch {patch.parent}, which is missing in the chain.")


def _merged(patch: PatchRecord) -> list[str]:
    metadata: Mapping[str, Any] = getattr(patch, "metadata", {})
    return list(metadata.get("merged", []))


def _joined(
    patches: Sequence[PatchRecord],
    parts: Sequence[tuple[Mapping[Any, int], Mapping[Any, int], Mapping[Any, Tensor], Mapping[Any, Tensor]]],
    lie: Sequence[bool],
) -> tuple[dict[Any, int], dict[Any, int], dict[Any, Tensor], dict[Any, Tensor]]:
    """Checksums before and after, flips and originals of a chain; each part has these four, by matrix.
    ``lie`` says which of them are applied.

    Raises:
        PatchError: a part does not begin where those before it end, or only some are applied.
    """
    before: dict[Any, int] = {}
    after: dict[Any, int] = {}
    flips: dict[Any, Tensor] = {}
    originals: dict[Any, Tensor] = {}
    applied = {on for on, part in zip(lie, parts, strict=True) if part[0]}
    if len(applied) > 1:
        raise PatchError("Some of these patches are applied and some are not; apply or revert all of them first.")
    for patch, (starts, ends, bits, kept) in zip(patches, parts, strict=True):
        for key, start in starts.items():
            if after.get(key, start) != start:
                raise PatchError(
                    f"Patch {patch.id} does not begin where the patches before it end ({_called(key)}): the order is "
                    "wrong, or a patch between them is missing."
                )
            before.setdefault(key, start)
            after[key] = ends[key]
        for key, some in bits.items():
            flips[key] = joined_flips(flips[key], some) if key in flips else some
        for key, original in kept.items():
            originals.setdefault(key, original)
    complete = all(part[2].keys() == part[0].keys() for part in parts)
    return before, after, flips if complete else {}, originals


def _called(key: Any) -> str:
    return f"layer {key[0]}, expert {key[1]}" if isinstance(key, tuple) else str(key)


def _different(patches: Iterable[WeightPatch]) -> str:
    return "fingerprints found: " + ", ".join(dict.fromkeys(p.fingerprint[:16] for p in patches))


def _pairs(table: Mapping[int, Mapping[int, Any]]) -> Iterable[tuple[tuple[int, int], Any]]:
    return (((layer, expert), value) for layer, experts in table.items() for expert, value in experts.items())


def _flat(*tables: Mapping[int, Mapping[int, Any]]) -> Any:
    return tuple(dict(_pairs(table)) for table in tables)


def _nested(table: Mapping[tuple[int, int], Any]) -> dict[int, dict[int, Any]]:
    found: dict[int, dict[int, Any]] = {}
    for (layer, expert), value in table.items():
        found.setdefault(layer, {})[expert] = value
    return found
