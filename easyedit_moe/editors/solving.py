"""What the solvers for expert weights share: prepare, find targets, loop over the critical layers, write.

A method only says how one layer's system is solved (`SolvingEditor.solve`) and how a solution is placed in
a layer (`SolvingEditor.place`).
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.algebra.coordinates import Coordinates
from easyedit_moe.algebra.core_update import Update
from easyedit_moe.algebra.held import HeldSystem, ridge_suffices
from easyedit_moe.algebra.hypersphere import principal_directions_of
from easyedit_moe.algebra.metric import IdentityMetric, Metric, covariance_metric, mean_energy
from easyedit_moe.algebra.nullspace import NullSpace
from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.algebra.tucker import TuckerBasis
from easyedit_moe.editors.base import Editor, EditResult, provenance
from easyedit_moe.editors.lasting import Carried, Lasting
from easyedit_moe.editors.measuring import Fit, residual_shares
from easyedit_moe.editors.memory import EditMemory, Holding, Remembered, Row
from easyedit_moe.editors.planner import MemoryPlan, Workload, plan
from easyedit_moe.editors.prepared import Prepared, PreparedLayer
from easyedit_moe.editors.replay import facts_to_replay
from easyedit_moe.editors.solving_diagnosis import Solved, diagnose_solved
from easyedit_moe.editors.spreading import spread
from easyedit_moe.errors import LayerError, LayoutError
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.facts.tokens import encode_text, pad_id
from easyedit_moe.hparams import SolverHyperParams
from easyedit_moe.hparams.sites import CALLED, EXPERTS
from easyedit_moe.measure import Stopwatch
from easyedit_moe.moe.capture import FactStates, LayerInputs, capture_facts
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.probe import check_keys, measured_tail, starts_anywhere
from easyedit_moe.moe.shapes import shapes_of
from easyedit_moe.moe.tails import FactPlaces, Tail
from easyedit_moe.patches.weights import PatchWriter, writing
from easyedit_moe.statistics.gather import fresh_statistics, layer_statistics
from easyedit_moe.statistics.moments import LayerMoments
from easyedit_moe.statistics.null_spaces import layer_null_space, null_space_of
from easyedit_moe.targets.cache import found_targets
from easyedit_moe.targets.joining import Place, joined_facts
from easyedit_moe.targets.search import (
    FactContext,
    TargetSettings,
    TargetVectors,
    fact_contexts,
    outcomes,
)

logger = logging.getLogger(__name__)


class SolvingEditor(Editor):
    """Base of the editors that solve for the experts' down-projections.

    What was prepared on one model is not used on another: then it is prepared anew.
    """

    hparams: SolverHyperParams

    def __init__(self, hparams: SolverHyperParams, prepared: Prepared | None = None, progress: bool = True) -> None:
        super().__init__(hparams, progress)
        self.prepared = prepared
        self.holding = Holding()
        if hparams.site != EXPERTS:
            vars(self)["edits"] = CALLED[hparams.site]

    @abstractmethod
    def solve(self, keys: RoutedKeys, residual: Tensor, prepared: PreparedLayer, lambda_reg: float) -> tuple[Any, Any]:
        """A solution of one layer's system for T keys and residuals ``[T, d]``, and a report or None.

        ``lambda_reg`` is the ridge of this system, as `ridge` finds it.
        """

    def ridge(self, keys: RoutedKeys, prepared: PreparedLayer, edits_before: int) -> float:
        """Lambda of one layer's system: absolute, or in units of the facts' `energy` there.

        Args:
            keys: of the facts' contexts, each counted fully.
            prepared: the layer.
            edits_before: edits of earlier batches.
        """
        if self.hparams.lambda_relative is None:
            return float(self.hparams.lambda_reg or 0.0)
        # Keys that have nothing left in the null space give no unit, and any ridge gives them the zero update.
        return self.hparams.lambda_relative * (self.energy(keys, prepared) or 1.0)

    def energy(self, keys: RoutedKeys, prepared: PreparedLayer) -> float:
        """Mean squared norm of the gated keys as this method's system has them."""
        return mean_energy(keys, prepared.metric)

    def solve_beside(
        self,
        layer: int,
        held: Mapping[Row, RoutedKeys],
        keys: RoutedKeys,
        residual: Tensor,
        prepared: PreparedLayer,
        lambda_reg: float,
    ) -> tuple[Any, Any]:
        """As `solve`, while what the held keys of earlier edits yield is to stay: by default rows of zero residual.

        Methods that have `coordinates` do it by `solve_reduced`, at a cost that does not grow.
        """
        coordinates = self.coordinates(keys, prepared) if held else None
        if coordinates is not None and ridge_suffices(keys, coordinates, lambda_reg):
            system = self.holding.system(layer, prepared, held, coordinates, lambda_reg)
            return self.solve_reduced(keys, residual, system, coordinates), None
        if held:
            keys, residual = _with_kept(list(held.values()), keys, residual)
        return self.solve(keys, residual, prepared, lambda_reg)

    def coordinates(self, keys: RoutedKeys, prepared: PreparedLayer) -> Coordinates | None:
        """The unknowns of one layer's system, for methods whose solution `solve_reduced` finds, too."""
        return None

    def solve_reduced(self, keys: RoutedKeys, residual: Tensor, system: HeldSystem, coordinates: Any) -> Any:
        """What `solve` would give for the held rows and these, by the reduced system of the new ones."""
        raise NotImplementedError

    def place(self, solution: Any, prepared: PreparedLayer) -> Update:
        """The update of a layer that a solution means; the solution itself unless a method says otherwise."""
        update: Update = solution
        return update

    def basis(
        self, view: MoELayerView, layer: int, moments: LayerMoments | None, fingerprint: str
    ) -> TuckerBasis | None:
        """The Tucker basis of a layer, for methods that have one."""
        return None

    def combined(self, layers: dict[int, PreparedLayer]) -> dict[int, PreparedLayer]:
        """The layers as they are used together: as each was prepared, unless a method relates them to each other."""
        return layers

    @classmethod
    def plan_for(cls, hparams: SolverHyperParams, model: nn.Module, workload: Workload) -> MemoryPlan:
        """See `Editor.plan_for` and `easyedit_moe.editors.planner.plan`."""
        shapes = shapes_of(model, hparams.layers, hparams.site)
        edits, earlier, device = workload.edits, workload.earlier_edits, workload.device_of(hparams)
        return plan(shapes, hparams, edits, earlier, workload.lengths, workload.budget, device)

    def prepare(self, model: nn.Module, tok: PreTrainedTokenizerBase) -> Prepared:
        """Check the layers, collect or read statistics, build metrics and bases; kept for later batches.

        Raises:
            LayoutError, LayerError, DataError, CacheError, NumericalError, HyperParamsError: see the parts.
        """
        watch = Stopwatch()
        with watch.stage("statistics"):
            view = MoELayerView(model, site=self.hparams.site)
            self._check_model(view)
            self._log_plan(view)
            layers = self.hparams.edited_layers
            probe = encode_text(tok, "The quick brown fox jumps over the lazy dog.")[:32]
            tails = {}
            for layer in layers:
                check_keys(view, layer, probe, pad_id(tok))
                tails[layer] = measured_tail(view, layer, probe, pad_id(tok))
            resumable = starts_anywhere(view, layers, probe, pad_id(tok))
            fingerprint = model_fingerprint(view)
            moments: dict[int, LayerMoments] = {}
            if self.hparams.needs_statistics:
                moments = layer_statistics(view, tok, self.hparams, layers, fingerprint, self.progress)
            # The moments of a layer are let go as soon as its metric and basis are made.
            made = {n: self._prepared_layer(view, n, tails[n], moments.pop(n, None), fingerprint) for n in layers}
            made = self.combined(made)
        self.prepared = Prepared(fingerprint, made, resumable, watch.seconds["statistics"])
        return self.prepared

    def edit_batch(
        self, model: nn.Module, tok: PreTrainedTokenizerBase, facts: list[EditRequest], memory: Any, targets: Any
    ) -> EditResult:
        """Solve and write, group by group; raises what `prepare` and the solvers raise."""
        watch, view = Stopwatch(), MoELayerView(model, site=self.hparams.site)
        self._check_model(view)
        with watch.stage("statistics"):
            prepared = self._prepared_for(view, model, tok)
            memory = memory or EditMemory()
            carried = self._refreshed(view, tok, prepared, memory)
            if carried.prepared is not None and carried.prepared.fingerprint == prepared.fingerprint:
                prepared = carried.prepared
        group = getattr(self.hparams, "edits_per_solve", None) or len(facts)
        used: list[TargetVectors] = []
        reports: list[Any] = []
        solved: list[Solved] = []
        seen: list[Remembered] = []
        with writing(view) as writer:
            for start in range(0, len(facts), group):
                chunk = facts[start : start + group]
                known = memory.extended(seen, start, carried)
                batch = BatchSolve(self, view, tok, chunk, prepared, known, writer, watch)
                used.append(batch.take_targets(None if targets is None else targets.rows(start, start + group)))
                spread(batch)
                reports += batch.reports
                seen.append(batch.remembered())
                carried = batch.closed()
                solved.append(batch.solved(used[-1]))
            with watch.stage("write"):
                patch = writer.finish(provenance(self.hparams, facts, used), prepared.fingerprint)
            with watch.stage("diagnose"):
                earlier = memory if self.hparams.remember_edits else EditMemory()
                diagnosis = diagnose_solved(self.hparams, view, prepared, patch, EditMemory(seen).keys, earlier, solved)
            kept = memory.extended(seen if self.hparams.remember_edits else [], len(facts), carried)
            return EditResult(patch, watch.seconds, kept, used, reports, diagnosis)

    def _prepared_for(self, view: MoELayerView, model: nn.Module, tok: PreTrainedTokenizerBase) -> Prepared:
        if self.prepared is None or self.prepared.fingerprint != model_fingerprint(view):
            return self.prepare(model, tok)
        return self.prepared

    def _refreshed(
        self, view: MoELayerView, tok: PreTrainedTokenizerBase, prepared: Prepared, memory: EditMemory
    ) -> Carried:
        """What is carried on, with metrics of the edited model where ``refresh_every`` asks for them now."""
        every, carried = self.hparams.refresh_every, memory.carried
        if every is None or memory.edits - carried.refreshed < every:
            return carried
        layers = dict(prepared.layers)
        moments = fresh_statistics(view, tok, self.hparams, list(layers), prepared.fingerprint, self.progress)
        for layer, one in moments.items():
            metric = self._metric(layer, one, None)
            ranks = tuple(metric.ranks) if isinstance(metric, NullSpace) else None
            layers[layer] = replace(layers[layer], metric=metric, coverage=one.counts, null_space=ranks)
        return replace(carried, prepared=replace(prepared, layers=layers), refreshed=memory.edits)

    def _prepared_layer(
        self, view: MoELayerView, layer: int, tail: Tail, moments: LayerMoments | None, fingerprint: str
    ) -> PreparedLayer:
        metric = self._metric(layer, moments, fingerprint)
        ranks = tuple(metric.ranks) if isinstance(metric, NullSpace) else None
        basis = self.basis(view, layer, moments, fingerprint)
        experts = view.layers[layer].experts.layout.num_experts
        coverage = None if moments is None else moments.counts
        directions, share = None, self.hparams.sphere_energy
        if share is not None:
            directions = principal_directions_of(view.layers[layer].experts.read, experts, share)
        kept = moments.keys if moments is not None and self.hparams.preservation_bound is not None else None
        return PreparedLayer(experts, tail, metric, basis, coverage, ranks, directions, kept)

    def target_settings(self) -> tuple[int, tuple[str, ...], TargetSettings]:
        """All that target vectors depend on besides model and requests: layer, context prefixes, optimisation."""
        hp = self.hparams
        return hp.layers[-1], tuple(hp.context_prefixes), TargetSettings.of(hp)

    def _log_plan(self, view: MoELayerView) -> None:
        if not logger.isEnabledFor(logging.INFO):
            return
        try:
            found = plan(shapes_of(view.model, self.hparams.layers, self.hparams.site), self.hparams)
        except LayoutError as error:  # a config that does not tell the sizes is no reason not to edit
            logger.info("No memory plan: %s", error)
        else:
            logger.info("%s", found.summary())

    def _metric(self, layer: int, moments: LayerMoments | None, fingerprint: str | None) -> Metric:
        """``fingerprint`` is None for moments of an edited model, which no cache holds."""
        hp = self.hparams
        if hp.metric == "identity" or moments is None:
            return IdentityMetric()
        if hp.metric == "covariance":
            return covariance_metric(
                moments.keys, moments.counts, hp.covariance_ridge, hp.min_coverage, hp.low_coverage
            )
        if fingerprint is None:
            return null_space_of(moments, hp)
        return layer_null_space(layer, moments, hp, fingerprint)

    def _check_model(self, view: MoELayerView) -> None:
        view.require(self.hparams.layers)
        wanted = self.hparams.v_loss_layer
        if wanted is not None and wanted != view.num_layers - 1:
            raise LayerError(
                f"v_loss_layer must be the last layer ({view.num_layers - 1}) or None, since targets are read from the "
                f"model's own logits; found {wanted}."
            )


def _with_kept(kept: Sequence[RoutedKeys], keys: RoutedKeys, residual: Tensor) -> tuple[RoutedKeys, Tensor]:
    """With rows before the others whose residual is 0: what they yield is kept."""
    everything = RoutedKeys.cat([*kept, keys])
    zeros = residual.new_zeros(everything.num_tokens - keys.num_tokens, residual.shape[1])
    return everything, torch.cat([zeros, residual])


def _where(contexts: Sequence[Sequence[FactContext]]) -> tuple[Place, ...]:
    """Per fact, the tokens up to the fact token of its bare prompt."""
    return tuple(tuple(found[0].ids[: found[0].fact + 1]) for found in contexts)


class BatchSolve:
    """One solve: a group of requests, and those replayed with them, at the current weights of the model."""

    def __init__(
        self,
        editor: SolvingEditor,
        view: MoELayerView,
        tok: PreTrainedTokenizerBase,
        facts: Sequence[EditRequest],
        prepared: Prepared,
        memory: EditMemory,
        writer: PatchWriter,
        watch: Stopwatch,
    ) -> None:
        self.editor, self.view, self.tok, self.new = editor, view, tok, len(facts)
        self.hparams, self.prepared = editor.hparams, prepared
        self.memory = memory if editor.hparams.remember_edits else EditMemory()
        self.edits_before = memory.edits
        self.lasting = Lasting(self.hparams, view, prepared, memory.carried)
        self.facts = list(facts)
        self.contexts = self._contexts(facts)
        again = self._replayed()
        self.facts += again
        self.contexts += self._contexts(again)
        self.where = _where(self.contexts)
        self.places = self.where if self.hparams.join_facts else ()
        self.writer, self.watch = writer, watch
        self.reports: list[Any] = []
        self.keys: dict[int, RoutedKeys] = {}
        self.residuals: dict[int, Tensor] = {}
        self.wanted: dict[int, Tensor] = {}
        self.fits: dict[int, Fit] = {}

    def _contexts(self, facts: Sequence[EditRequest]) -> list[list[FactContext]]:
        """Per fact, where it is asked: the bare prompt first."""
        hp = self.hparams
        return [fact_contexts(self.tok, fact, hp.context_prefixes, hp.fact_token, hp.chat) for fact in facts]

    def _replayed(self) -> list[EditRequest]:
        """Earlier facts that are solved for once more."""
        hp = self.hparams
        if not hp.replay_facts:
            return []
        places = _where(self.contexts)
        known = self.lasting.carried.joined
        return facts_to_replay(known, self.facts, places, hp.replay_facts, self.edits_before, hp.join_facts)

    def take_targets(self, given: TargetVectors | None) -> TargetVectors:
        """Aim at the target vectors of all facts; returns those of the new ones: as ``given``, or found."""
        known = 0 if given is None else self.new
        parts = [given] if given is not None else []
        if known < len(self.facts):
            parts.append(self.find_targets(slice(known, None)))
        targets = TargetVectors.cat(parts)
        self._aim(targets)
        return targets.rows(0, self.new)

    def find_targets(self, which: slice) -> TargetVectors:
        """Target vectors of some of the facts, found or read."""
        groups = joined_facts(self.facts[which], self.places[which], self.lasting.carried.joined)
        asked, beside = [group[0] for group in groups.facts], [group[1:] for group in groups.facts]
        more: dict[str, Any] = {"beside": beside} if self.places else {}
        if self.hparams.anchor_targets:
            lying = dict(zip(groups.numbers, self.where[which], strict=True))
            more["first"] = [self.lasting.carried.first.get(lying[number]) for number in range(len(asked))]
        editor = self.editor
        with self.watch.stage("targets"):
            found = found_targets(
                self.hparams, editor.target_settings(), self.view, self.tok, asked, editor.progress,
                self.prepared.fingerprint, **more,
            )  # fmt: skip
            return found.taken(groups.numbers)

    def closed(self) -> Carried:
        """What is carried on from this solve."""
        self.lasting.close()
        if self.hparams.anchor_targets:
            states = self.before[:: self.per_fact].float()
            self.lasting.carried = self.lasting.carried.with_states(self.where, states)
        if not (self.hparams.join_facts or self.hparams.replay_facts):
            return self.lasting.carried
        places = {fact.prompt: place for fact, place in zip(self.facts, self.where, strict=True)}
        return self.lasting.carried.with_facts(places, self.facts)

    def remembered(self) -> Remembered:
        """What the memory is to hold of this solve."""
        return Remembered(tuple(fact.prompt for fact in self.facts), self.keys, self.places, self.wanted)

    def _aim(self, targets: TargetVectors) -> None:
        """Take the shifts to reach, and lay out every context in which each fact is captured."""
        hp = self.hparams
        contexts = [context for found in self.contexts for context in found]
        self.sequences = [context.ids for context in contexts]
        self.positions = [context.fact for context in contexts]
        self.per_fact = len(hp.context_prefixes) + 1
        self.delta = targets.delta.repeat_interleave(self.per_fact, dim=0)
        self.inputs = LayerInputs(hp.edited_layers) if self.prepared.resumable else None

    def begun(self, output: Tensor) -> Tensor:
        """Note the unedited states ``[T, D]`` at the last layer; returns those that are wanted there."""
        self.before = output
        return output + self.delta.to(output.device)

    def measure(self, start: int) -> None:
        """See how far the fact tokens moved, in a forward from the first layer that it has not seen written."""
        last = self.hparams.layers[-1]
        with self.watch.stage("diagnose"):
            after = self.capture([], [last], start).outputs[last]
            self.shares = residual_shares(self.before, after, self.delta, self.per_fact)

    def solved(self, targets: TargetVectors) -> Solved:
        """What became of the new requests."""
        told, shares = outcomes(self.facts[: self.new], targets), self.shares[: self.new]
        return Solved(told, int(targets.steps.max()), shares, self.fits)

    def capture(self, layers: Sequence[int], outputs: Sequence[int], start: int | None = None) -> FactStates:
        """Keys of some layers and outputs of some at the fact tokens, in one forward; see `capture_facts`."""
        return capture_facts(
            self.view,
            self.sequences,
            self.positions,
            layers,
            outputs,
            pad_id(self.tok),
            self.hparams.capture_batch_size,
            self.inputs,
            start,
        )

    def solve(self, layer: int, keys: RoutedKeys, residual: Tensor) -> Any:
        """A solution for wanted changes ``[T, D]`` of the layer's output, as the editor's `SolvingEditor.solve`."""
        prepared = self.prepared.layers[layer]
        ridge = self.lasting.ridge(layer, self.editor.ridge(keys, prepared, self.edits_before))
        # Each fact counts once however many contexts it has: the objective is a mean over its contexts.
        weight = 1 / sqrt(self.per_fact)
        keys = RoutedKeys(keys.expert, keys.gate * weight, keys.key)
        places = FactPlaces(
            self.view, self.sequences, self.positions, pad_id(self.tok), self.hparams.capture_batch_size
        )
        tail = prepared.tail
        residual = tail.pull_back(layer, residual.to(keys.key.device), weight, places)
        self.keys[layer], self.residuals[layer] = keys, residual
        residual = self.lasting.aimed(layer, keys, residual)
        before = self._keys_before(layer, tail.reach, weight)
        if before:
            keys, residual = _with_kept(before, keys, residual)
        held_rows = self.memory.rows(layer, self.places or [fact.prompt for fact in self.facts])
        if self.hparams.cumulative_ridge:
            wanted = self.lasting.cumulated(layer, keys, residual)
            self.wanted[layer] = wanted[-self.keys[layer].num_tokens :]
            earlier = [solve.wanted_of(layer, fact) for solve, fact in held_rows]
            keys, wanted = RoutedKeys.cat([*held_rows.values(), keys]), torch.cat([*earlier, wanted])
            solution, report = self.editor.solve(keys, wanted, prepared, ridge)
        else:
            solution, report = self.editor.solve_beside(layer, held_rows, keys, residual, prepared, ridge)
        if report is not None:
            self.reports.append(report)
        return solution

    def _keys_before(self, layer: int, reach: int, weight: float) -> list[RoutedKeys]:
        """Keys of the tokens before the fact tokens whose experts reach them, too: what they return is kept."""
        found = []
        for back in range(1, reach + 1):
            rows = [i for i, position in enumerate(self.positions) if position >= back]
            if rows:
                state = capture_facts(
                    self.view, [self.sequences[i] for i in rows], [self.positions[i] - back for i in rows], [layer], [],
                    pad_id(self.tok), self.hparams.capture_batch_size,
                )  # fmt: skip
                keys = state.keys[layer]
                found.append(RoutedKeys(keys.expert, keys.gate * weight, keys.key))
        return found

    def write(self, layer: int, solution: Any, share: float) -> None:
        """Place ``share`` of a solution in a layer."""
        with self.watch.stage("write"):
            update = self.editor.place(solution, self.prepared.layers[layer])
            part = update.scale(share) if share != 1.0 else update
            limited = self.lasting.limited(layer, part)
        if layer in self.keys:
            with self.watch.stage("diagnose"):
                whole = update if limited is part else limited.scale(1 / share)
                fit = Fit.of(whole, self.keys[layer], self.residuals.pop(layer))
                self.fits[layer] = self.fits.get(layer, Fit()) + fit
        with self.watch.stage("write"):
            self.writer.write(layer, limited)
