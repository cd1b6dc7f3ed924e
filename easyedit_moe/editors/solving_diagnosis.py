"""The diagnosis of an edit by a method that solves for the experts' down-projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.editors.diagnosis import (
    EditDiagnosis,
    ExpertDiagnosis,
    FactDiagnosis,
    LayerDiagnosis,
    settings_of,
)
from easyedit_moe.editors.measuring import Fit, combined_loss, relative_updates
from easyedit_moe.editors.memory import EditMemory
from easyedit_moe.editors.prepared import Prepared, PreparedLayer
from easyedit_moe.hparams import SolverHyperParams
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.weights import WeightPatch
from easyedit_moe.targets.outcomes import Outcome


@dataclass(frozen=True)
class Solved:
    """What became of a group of requests that were solved together.

    Attributes:
        outcomes: of the search of their target vectors.
        steps: updates that the longest of these searches made.
        shares: per request, the share of the residual that was reached.
        fits: per layer that was solved for, how well the solution fits.
    """

    outcomes: Sequence[Outcome]
    steps: int
    shares: Sequence[float | None]
    fits: Mapping[int, Fit]


def diagnose_solved(
    hparams: SolverHyperParams,
    view: MoELayerView,
    prepared: Prepared,
    patch: WeightPatch,
    keys: Mapping[int, Sequence[RoutedKeys]],
    remembered: EditMemory,
    solved: Sequence[Solved],
) -> EditDiagnosis:
    """What an edit did that is written.

    Args:
        hparams: of the method.
        view: of the edited model.
        prepared: what the layers' systems were made of.
        patch: the edit, applied.
        keys: per layer that was solved for, the facts' routed keys.
        remembered: keys of earlier edits that were held in place.
        solved: the groups, in the order of the requests.
    """
    moved = relative_updates(view, patch.originals)
    told = [pair for group in solved for pair in zip(group.outcomes, group.shares, strict=True)]
    facts = [FactDiagnosis(**vars(outcome), residual_share=share) for outcome, share in told]
    layers = []
    for layer in hparams.edited_layers:
        hit = _hit(keys[layer]) if layer in keys else sorted(moved.get(layer, {}))
        fit = sum((g.fits[layer] for g in solved if layer in g.fits), Fit())
        loss = combined_loss([(r.rounding_loss, r.update_norm) for r in patch.reports if r.layer == layer])
        experts = _experts(hit, moved.get(layer, {}), prepared.layers[layer])
        layers.append(LayerDiagnosis(layer, experts, loss or 0.0, fit.share, fit.shrinkage))
    return EditDiagnosis(
        hparams.alg_name,
        tuple(facts),
        tuple(layers),
        dtype=next(iter(patch.dtypes.values()), None),
        changed=patch.before != patch.after,
        rounding_loss=combined_loss([(r.rounding_loss, r.update_norm) for r in patch.reports]),
        steps=max(group.steps for group in solved),
        remembered=remembered.rows(hparams.layers[-1]).num_tokens,
        settings=settings_of(hparams),
    )


def _hit(keys: Sequence[RoutedKeys]) -> list[int]:
    """The experts that the router picks for a fact token, in any context."""
    return torch.unique(torch.cat([part.expert[part.gate != 0] for part in keys])).tolist()


def _experts(
    hit: Sequence[int], moved: Mapping[int, float | None], prepared: PreparedLayer
) -> tuple[ExpertDiagnosis, ...]:
    ranks = prepared.null_space
    coverage = None if prepared.coverage is None else prepared.coverage.tolist()
    return tuple(
        ExpertDiagnosis(
            expert,
            moved.get(expert, 0.0),
            None if ranks is None else ranks[expert],
            None if coverage is None else int(coverage[expert]),
        )
        for expert in hit
    )
