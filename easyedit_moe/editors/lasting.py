"""Options for long runs, of one solve: what they change of a layer's system and update, and what they carry on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from easyedit_moe.algebra.core_update import CoreUpdate, Update
from easyedit_moe.algebra.cumulative import less, output_change
from easyedit_moe.algebra.hypersphere import projected
from easyedit_moe.algebra.norm_anchor import anchored
from easyedit_moe.algebra.preservation import FIRST, next_queue, preservation_loss
from easyedit_moe.algebra.routed_keys import FactoredUpdate, RoutedKeys
from easyedit_moe.algebra.sequence_norm import Running, sequence_normalised
from easyedit_moe.editors.prepared import Prepared
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.hparams import SolverHyperParams
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.targets.joining import Place


@dataclass(frozen=True)
class LayerState:
    """What the options carry of one layer.

    Attributes:
        norms: ``[E]`` float64, ``||W_j||_F`` before the first edit (``norm_anchor``).
        queue: LyapLock's virtual queue (``preservation_bound``).
        drift: ``[E, d, h]`` float32, what all edits together changed (likewise).
        energy: what the preservation loss is a share of, by the weights before the first edit (likewise).
        keys, residuals: running statistics (``sequence_rate``).
    """

    norms: Tensor | None = None
    queue: float = FIRST
    drift: Tensor | None = None
    energy: float = 0.0
    keys: Running | None = None
    residuals: Running | None = None


@dataclass(frozen=True)
class Carried:
    """What options for long runs carry from batch to batch, as part of the editor's memory.

    Attributes:
        layers: by index.
        joined: the newest fact of each prompt, by the place where it lies (``join_facts``).
        first: ``[d]`` float32, the state at each place before it was first edited (``anchor_targets``).
        prepared: what was prepared anew on the edited model, and after how many edits (``refresh_every``).
        refreshed: see there.
    """

    layers: Mapping[int, LayerState] = field(default_factory=dict)
    joined: Mapping[Place, Mapping[str, EditRequest]] = field(default_factory=dict)
    first: Mapping[Place, Tensor] = field(default_factory=dict)
    prepared: Prepared | None = None
    refreshed: int = 0

    def with_facts(self, places: Mapping[str, Place], facts: list[EditRequest]) -> Carried:
        """With these facts where their prompts lie, in place of what was asked of the same prompts before."""
        joined = dict(self.joined)
        for fact in facts:
            place = places[fact.prompt]
            joined[place] = {**joined.get(place, {}), fact.prompt: fact}
        return replace(self, joined=joined)

    def with_states(self, places: Sequence[Place], states: Tensor) -> Carried:
        """With the states ``[T, d]`` of places that were not edited before."""
        # One copy from the device; then each has memory of its own.
        new = {place: state.clone() for place, state in zip(places, states.cpu(), strict=True)}
        return replace(self, first={**new, **self.first})


class Lasting:
    """The options in one solve; ``carried`` is what the next one is given."""

    def __init__(self, hparams: SolverHyperParams, view: MoELayerView, prepared: Prepared, carried: Carried) -> None:
        self.hparams, self.view, self.prepared, self.carried = hparams, view, prepared, carried

    def ridge(self, layer: int, ridge: float) -> float:
        """The ridge, times the layer's queue where preservation is bounded."""
        return ridge * self._state(layer).queue

    def cumulated(self, layer: int, keys: RoutedKeys, residual: Tensor) -> Tensor:
        """The residual ``[T, d]`` for the sum of all edits, these included."""
        drift = self._state(layer).drift
        return residual if drift is None else residual + output_change(drift, keys).to(residual)

    def aimed(self, layer: int, keys: RoutedKeys, residual: Tensor) -> Tensor:
        """The residual ``[T, d]`` that is solved for."""
        rate = self.hparams.sequence_rate
        if rate is None:
            return residual
        state, experts = self._state(layer), self.prepared.layers[layer].num_experts
        known = state.keys or Running.empty(experts, keys.d_hidden, residual.device)
        aims = state.residuals or Running.empty(1, residual.shape[1], residual.device)
        aimed, known, aims = sequence_normalised(keys, residual, known, aims, rate)
        self._keep(layer, replace(state, keys=known, residuals=aims))
        return aimed.to(residual)

    def limited(self, layer: int, update: Update) -> Update:
        """The update that is written, before it is; a core is expanded where an option changes or keeps it."""
        hp, prepared = self.hparams, self.prepared.layers[layer]
        drift = self._state(layer).drift
        if not hp.changes_updates:
            return update
        if isinstance(update, CoreUpdate):
            update = update.expanded()
        if hp.cumulative_ridge and drift is not None:
            update = less(update, drift)
        if prepared.directions is not None:
            update = projected(update, prepared.directions, hp.sphere_strength)
        if hp.norm_anchor is not None:
            experts = self.view.layers[layer].experts
            state = self._state(layer)
            if state.norms is None:
                sizes = [torch.linalg.matrix_norm(experts.read(j).double()) for j in range(prepared.num_experts)]
                state = replace(state, norms=torch.stack(sizes))
                self._keep(layer, state)
            weights = {j: experts.read(j) for j in update.experts}
            norms = state.norms if state.norms is not None else torch.zeros(0)
            update, _ = anchored(update, weights, norms, hp.norm_anchor)
        if hp.keeps_drift:
            self._drifted(layer, update)
        return update

    def _drifted(self, layer: int, update: FactoredUpdate) -> None:
        state = self._state(layer)
        energy, drift = state.energy, state.drift
        if drift is None:
            weights = self.view.layers[layer].experts.stacked(torch.float32)
            drift = torch.zeros_like(weights)
            if self.hparams.preservation_bound is not None:
                energy = preservation_loss(weights, *self.prepared.layers[layer].needed_moments())
        drift = drift.clone()  # a memory is a value: that of the batch before stays what it was
        for expert, delta in update.deltas():
            drift[expert] += delta.to(drift)
        self._keep(layer, replace(state, drift=drift, energy=energy))

    def close(self) -> None:
        """Let the queues of all layers take in what this solve did to preserved keys."""
        bound = self.hparams.preservation_bound
        if bound is None:
            return
        for layer, state in dict(self.carried.layers).items():
            if state.drift is None:
                continue
            moments, counts = self.prepared.layers[layer].needed_moments()
            loss = preservation_loss(state.drift, moments, counts) / (state.energy or 1.0)
            self._keep(layer, replace(state, queue=next_queue(state.queue, loss, bound)))

    def _state(self, layer: int) -> LayerState:
        return self.carried.layers.get(layer, LayerState())

    def _keep(self, layer: int, state: LayerState) -> None:
        self.carried = replace(self.carried, layers={**self.carried.layers, layer: state})
