"""MoTE (arXiv 2605.16686): the update is restricted to the Tucker manifold of the layer's experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from easyedit_moe.algebra.coordinates import CoreCoordinates
from easyedit_moe.algebra.core import FactoredCore, core_energy, solve_mote, solve_mote_held
from easyedit_moe.algebra.core_update import Update, place_core
from easyedit_moe.algebra.gauge import aligned_basis
from easyedit_moe.algebra.held import HeldSystem
from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.algebra.tucker import TuckerBasis
from easyedit_moe.editors.prepared import PreparedLayer
from easyedit_moe.editors.solving import SolvingEditor
from easyedit_moe.hparams import MoTEHyperParams
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.statistics.bases import layer_basis
from easyedit_moe.statistics.moments import LayerMoments


class MoTEEditor(SolvingEditor):
    """Ridge on the Tucker core, ``Delta_j = U_out (sum_a U_e[j,a] G_a) U_in^T P_j``.

    As in its paper with ``spread: update`` (eq. 14: the core, divided by the layers left, is mapped back by each
    layer's own factors and projectors). The factors are brought into the gauge of the last layer's first, which the
    paper leaves open (`easyedit_moe.algebra.gauge`). Other spreads solve a core per layer and are ours.
    """

    method = "MoTE"
    hparams: MoTEHyperParams

    def solve(self, keys: RoutedKeys, residual: Tensor, prepared: PreparedLayer, lambda_reg: float) -> tuple[Any, Any]:
        """A Tucker core, factored or dense, whichever is smaller."""
        core = solve_mote(keys, residual, lambda_reg, prepared.metric, prepared.tucker_basis())
        if isinstance(core, FactoredCore):
            # One expert factor for all cores of a layer, so that patches share it.
            core = replace(core, u_expert=prepared.tucker_factors.expert)
        return core, None

    def energy(self, keys: RoutedKeys, prepared: PreparedLayer) -> float:
        """Mean squared norm of the facts' features, on which the core acts."""
        return core_energy(keys, prepared.tucker_basis(), prepared.metric)

    def coordinates(self, keys: RoutedKeys, prepared: PreparedLayer) -> CoreCoordinates | None:
        """The core's, unless a subclass solves in another way."""
        if type(self).solve is not MoTEEditor.solve:
            return None
        return CoreCoordinates(prepared.tucker_basis(), prepared.metric)

    def solve_reduced(
        self, keys: RoutedKeys, residual: Tensor, system: HeldSystem, coordinates: CoreCoordinates
    ) -> FactoredCore | Tensor:
        """The core of all rows."""
        return solve_mote_held(keys, residual, system, coordinates)

    def place(self, solution: FactoredCore | Tensor, prepared: PreparedLayer) -> Update:
        """The core, and the layer's own factors and projectors, which map it back as it is written."""
        return place_core(solution, prepared.tucker_factors)

    def combined(self, layers: dict[int, PreparedLayer]) -> dict[int, PreparedLayer]:
        """Where the last layer's core is mapped back by all layers' factors, those in its gauge."""
        if self.hparams.spread != "update":
            return layers
        last = layers[self.hparams.layers[-1]].tucker_basis()
        return {n: replace(one, basis=aligned_basis(one.tucker_basis(), last)) for n, one in layers.items()}

    def basis(self, view: MoELayerView, layer: int, moments: LayerMoments | None, fingerprint: str) -> TuckerBasis:
        """The layer's Tucker basis, from the cache where it is there."""
        return layer_basis(view.layers[layer], self.hparams, moments, fingerprint)


apply_mote_to_model = MoTEEditor.apply_to_model
