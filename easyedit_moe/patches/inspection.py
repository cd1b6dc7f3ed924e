"""What a patch says of itself, as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyedit_moe.patches.tensors import TensorPatch
from easyedit_moe.patches.weights import WeightPatch


def describe(patch: WeightPatch | TensorPatch, path: str | Path | None = None) -> dict[str, Any]:
    """Method, facts, base, parents, what is touched and how much of it, warnings and settings; all as JSON.

    Args:
        patch: applied or not; nothing is computed on a model.
        path: the file it is in, for its size.

    Returns:
        ``kind``, ``site`` (None for whole tensors), ``id``, ``parent``, ``merged`` (ids of the parts of a
        merged patch), ``folded`` (its steps are one per layer, the same up to rounding), ``methods``,
        ``models``, ``facts``, ``fingerprint``, ``base``, ``originals`` (the patch can be reverted by itself),
        ``touched`` (of factored updates per layer, of whole tensors per parameter), ``rounding_loss`` (the
        largest), ``warnings``, ``settings`` (of each part), ``versions``, ``notes`` (whatever else its maker
        wrote) and ``bytes``. What is not known is None, and a relative size is the norm of the update by that
        of the weight.
    """
    parts = patch.metadata.get("parts", [patch.metadata])
    settings = [part["hparams"] for part in parts if "hparams" in part]
    known = {"hparams", "requests", "versions", "warnings", "parts", "merged", "folded"}
    weights = isinstance(patch, WeightPatch)
    return {
        "kind": "factored updates of down-projections" if weights else "whole tensors",
        "site": patch.site if isinstance(patch, WeightPatch) else None,
        "id": patch.id,
        "parent": patch.parent,
        "merged": patch.metadata.get("merged", []),
        "folded": bool(patch.metadata.get("folded")),
        "methods": methods_of(patch),
        "models": _distinct(settings, "model_name"),
        "facts": [fact for part in parts for fact in part.get("requests", [])],
        "fingerprint": patch.fingerprint,
        "base": patch.base,
        "originals": bool(patch.flips),
        "touched": _layers(patch) if isinstance(patch, WeightPatch) else _tensors(patch),
        "rounding_loss": max((report.rounding_loss for report in patch.reports), default=None),
        "warnings": list(patch.warnings),
        "settings": settings,
        "versions": parts[-1].get("versions", {}),
        "notes": [{name: value for name, value in part.items() if name not in known} for part in parts],
        "bytes": None if path is None else Path(path).stat().st_size,
    }


def methods_of(patch: WeightPatch | TensorPatch) -> list[str]:
    """The methods that made a patch or its parts, each once; empty where it does not say."""
    parts = patch.metadata.get("parts", [patch.metadata])
    return [str(name) for name in _distinct([part["hparams"] for part in parts if "hparams" in part], "alg_name")]


def relative_sizes(patch: WeightPatch) -> dict[int, dict[int, float | None]]:
    """Layer -> expert -> ``||update|| / ||weight before the patch||``; None where no report knows the weight.

    The update of an expert that was written several times is the sum of the writes; its norm comes from r x r Gram
    matrices.
    """
    before: dict[tuple[int, int], float] = {}
    for report in patch.reports:
        for expert, squared in report.weight_squared.items():
            before.setdefault((report.layer, expert), squared)
    found: dict[int, dict[int, float | None]] = {}
    for layer, expert, left, right in expert_factors(patch):
        weight = before.get((layer, expert))
        update = float(((left.T @ left) * (right.T @ right)).sum().clamp_min(0))
        found.setdefault(layer, {})[expert] = (update / weight) ** 0.5 if weight else None
    return found


def expert_factors(patch: WeightPatch) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Layer, expert, and the factors ``[d, r]`` and ``[h, r]`` of the sum of its writes, in float64 on the CPU.

    By layer and expert; one expert at a time, since together they are many times the patch.
    """
    for layer in patch.layers:
        steps = [update for number, update in patch.steps if number == layer]
        lefts = [update.left for update in steps]  # of a core it is computed
        for expert in sorted({expert for update in steps for expert in update.experts}):
            left, right = [], []
            for update, own in zip(steps, lefts, strict=True):
                if expert in update.experts:
                    place = update.experts.index(expert)
                    left.append(own[:, update.columns[place]].to("cpu", torch.float64))
                    right += [other.to("cpu", torch.float64) for other in update.rights(place, place + 1)]
            yield layer, expert, torch.cat(left, dim=1), torch.cat(right, dim=1)


def _layers(patch: WeightPatch) -> list[dict[str, Any]]:
    """Per layer: where its experts lie, and how much of each is new."""
    sizes = relative_sizes(patch)
    return [
        {
            "layer": layer,
            "name": patch.names.get(layer),
            "dtype": patch.dtypes.get(layer),
            "experts": [{"expert": expert, "relative_size": size} for expert, size in sorted(experts.items())],
        }
        for layer, experts in sorted(sizes.items())
    ]


def _tensors(patch: TensorPatch) -> list[dict[str, Any]]:
    """Per parameter: its name, shape and dtype, and how much of it is new."""
    sizes = {report.name: report.relative_size for report in patch.reports}
    return [
        {"name": name, "shape": list(value.shape), "dtype": patch.dtypes[name], "relative_size": sizes.get(name)}
        for name, value in sorted(patch.values.items())
    ]


def _distinct(settings: list[dict[str, Any]], name: str) -> list[Any]:
    return list(dict.fromkeys(value for value in _values(settings, name) if value is not None))


def _values(settings: list[dict[str, Any]], name: str) -> Iterator[Any]:
    return (part.get(name) for part in settings)
