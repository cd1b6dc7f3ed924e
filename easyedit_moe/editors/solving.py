"""What the solvers for expert weights share: prepare, find targets, loop over the critical layers, write.

A method only says how one layer's system is solved (`SolvingEditor.solve`) and how a solution is placed in
a layer (`SolvingEditor.place`).
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.algebra.metric import IdentityMetric, Metric, covariance_metric
from easyedit_moe.algebra.nullspace import NullSpace, null_space
from easyedit_moe.algebra.routed_keys import FactoredUpdate, RoutedKeys
from easyedit_moe.algebra.tucker import TuckerBasis
from easyedit_moe.editors.base import Editor, EditResult, provenance
from easyedit_moe.editors.measuring import Fit, residual_shares
from easyedit_moe.editors.memory import EditMemory, Holding, Remembered, Row
from easyedit_moe.editors.planner import MemoryPlan, Workload, plan, shapes_of
from easyedit_moe.editors.prepared import Prepared, PreparedLayer
from easyedit_moe.editors.solving_diagnosis import Solved, diagnose_solved
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
from easyedit_moe.moe.tails import FactPlaces, Tail
from easyedit_moe.patches.weights import PatchWriter, writing
from easyedit_moe.statistics.gather import layer_statistics
from easyedit_moe.statistics.moments import LayerMoments
from easyedit_moe.targets.cache import cached_targets
from easyedit_moe.targets.search import (
    TargetSearch,
    TargetSettings,
    TargetVectors,
    compute_targets,
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
    def solve(self, keys: RoutedKeys, residual: Tensor, prepared: PreparedLayer) -> tuple[Any, Any]:
        """A solution of one layer's system for T keys and residuals ``[T, d]``, and a report or None."""

    def solve_beside(
        self,
        layer: int,
        held: Mapping[Row, RoutedKeys],
        keys: RoutedKeys,
        residual: Tensor,
        prepared: PreparedLayer,
    ) -> tuple[Any, Any]:
        """As `solve`, while what the held keys of earlier edits yield is to stay: by default rows of zero residual.

        Methods that can do it at a cost that does not grow say how.
        """
        if held:
            everything = RoutedKeys.cat([*held.values(), keys])
            kept = residual.new_zeros(everything.num_tokens - keys.num_tokens, residual.shape[1])
            keys, residual = everything, torch.cat([kept, residual])
        return self.solve(keys, residual, prepared)

    def place(self, solution: Any, prepared: PreparedLayer) -> FactoredUpdate:
        """The update of a layer that a solution means; the solution itself unless a method says otherwise."""
        update: FactoredUpdate = solution
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
        return plan(shapes, hparams, edits, earlier, budget=workload.budget, device=device)

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
            layers = self.hparams.layers
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
        group = getattr(self.hparams, "edits_per_solve", None) or len(facts)
        used: list[TargetVectors] = []
        reports: list[Any] = []
        solved: list[Solved] = []
        seen: list[Remembered] = []
        memory = memory or EditMemory()
        with writing(view) as writer:
            for start in range(0, len(facts), group):
                chunk = facts[start : start + group]
                batch = BatchSolve(self, view, tok, chunk, prepared, memory.extended(seen), writer, watch)
                used.append(batch.find_targets() if targets is None else targets.rows(start, start + group))
                batch.aim(used[-1])
                batch.spread()
                reports += batch.reports
                seen.append(Remembered(tuple(fact.prompt for fact in chunk), batch.keys))
                solved.append(batch.solved(used[-1]))
            with watch.stage("write"):
                patch = writer.finish(provenance(self.hparams, facts), prepared.fingerprint)
            with watch.stage("diagnose"):
                held = memory if self.hparams.remember_edits else EditMemory()
                diagnosis = diagnose_solved(self.hparams, view, prepared, patch, EditMemory(seen).keys, held, solved)
        kept = memory.extended(seen) if self.hparams.remember_edits else memory
        return EditResult(patch, watch.seconds, kept, used, reports, diagnosis)

    def _prepared_for(self, view: MoELayerView, model: nn.Module, tok: PreTrainedTokenizerBase) -> Prepared:
        if self.prepared is None or self.prepared.fingerprint != model_fingerprint(view):
            return self.prepare(model, tok)
        return self.prepared

    def _prepared_layer(
        self, view: MoELayerView, layer: int, tail: Tail, moments: LayerMoments | None, fingerprint: str
    ) -> PreparedLayer:
        metric = self._metric(moments)
        ranks = tuple(metric.ranks) if isinstance(metric, NullSpace) else None
        basis = self.basis(view, layer, moments, fingerprint)
        experts = view.layers[layer].experts.layout.num_experts
        coverage = None if moments is None else moments.counts
        return PreparedLayer(experts, tail, metric, basis, coverage, ranks)

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

    def _metric(self, moments: LayerMoments | None) -> Metric:
        hp = self.hparams
        if hp.metric == "identity" or moments is None:
            return IdentityMetric()
        keys, counts = moments.keys, moments.counts
        if hp.metric == "covariance":
            return covariance_metric(keys, counts, hp.covariance_ridge, hp.min_coverage, hp.low_coverage)
        threshold, relative = hp.nullspace_threshold, hp.nullspace_relative
        return null_space(keys, counts, threshold, relative, hp.min_coverage, hp.low_coverage)

    def _check_model(self, view: MoELayerView) -> None:
        view.require(self.hparams.layers)
        wanted = self.hparams.v_loss_layer
        if wanted is not None and wanted != view.num_layers - 1:
            raise LayerError(
                f"v_loss_layer must be the last layer ({view.num_layers - 1}) or None, since targets are read from the "
                f"model's own logits; found {wanted}."
            )


class BatchSolve:
    """One solve: a group of requests at the current weights of the model."""

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
        self.editor, self.view, self.tok, self.facts = editor, view, tok, facts
        self.hparams, self.prepared = editor.hparams, prepared
        self.memory = memory if editor.hparams.remember_edits else EditMemory()
        self.writer, self.watch = writer, watch
        self.reports: list[Any] = []
        self.keys: dict[int, RoutedKeys] = {}
        self.residuals: dict[int, Tensor] = {}
        self.fits: dict[int, Fit] = {}

    def find_targets(self) -> TargetVectors:
        """Target vectors of these requests, found or read."""
        settings, progress = self.editor.target_settings(), self.editor.progress
        folder = self.hparams.target_cache_dir
        with self.watch.stage("targets"):
            if folder is None:
                return compute_targets(self.view, self.tok, self.facts, *settings, progress, warn=False)
            search = TargetSearch(self.view, self.tok, *settings, progress, warn=False)
            return cached_targets(folder, self.hparams.model_name, self.prepared.fingerprint, search, self.facts)

    def aim(self, targets: TargetVectors) -> None:
        """Take the shifts to reach, and lay out every context in which each fact is captured."""
        hp = self.hparams
        contexts = [
            context
            for fact in self.facts
            for context in fact_contexts(self.tok, fact, hp.context_prefixes, hp.fact_token, hp.chat)
        ]
        self.sequences = [context.ids for context in contexts]
        self.positions = [context.fact for context in contexts]
        self.per_fact = len(hp.context_prefixes) + 1
        self.delta = targets.delta.repeat_interleave(self.per_fact, dim=0)
        self.inputs = LayerInputs(hp.layers) if self.prepared.resumable else None

    def spread(self) -> None:
        """Solve and write all layers by the hparams' ``spread``."""
        layers = self.hparams.layers
        if self.hparams.spread == "update":
            with self.watch.stage("solve"):
                state = self._capture([layers[-1]])
                self.before = state.outputs[layers[-1]]
                solution = self._solve(layers[-1], state.keys[layers[-1]], self.delta)
            for left, layer in zip(range(len(layers), 0, -1), layers, strict=True):
                self._write(layer, solution, 1 / left)
            self._measure(start=layers[0])
            return
        wanted: Tensor | None = None
        written: int | None = None
        for left, layer in zip(range(len(layers), 0, -1), layers, strict=True):
            with self.watch.stage("solve"):
                state = self._capture([layer], written)
                output = state.outputs[layers[-1]]
                if wanted is None:
                    self.before = output
                    wanted = output + self.delta.to(output.device)
                solution = self._solve(layer, state.keys[layer], (wanted - output) / left)
            self._write(layer, solution, 1.0)
            written = layer
        self._measure(start=layers[-1])

    def _measure(self, start: int) -> None:
        """See how far the fact tokens moved, in a forward from the first layer that it has not seen written."""
        last = self.hparams.layers[-1]
        with self.watch.stage("diagnose"):
            after = self._capture([], start).outputs[last]
            self.shares = residual_shares(self.before, after, self.delta, self.per_fact)

    def solved(self, targets: TargetVectors) -> Solved:
        """What became of these requests."""
        return Solved(outcomes(self.facts, targets), int(targets.steps.max()), self.shares, self.fits)

    def _capture(self, layers: Sequence[int], start: int | None = None) -> FactStates:
        last = self.hparams.layers[-1]
        return capture_facts(
            self.view,
            self.sequences,
            self.positions,
            layers,
            [last],
            pad_id(self.tok),
            self.hparams.capture_batch_size,
            self.inputs,
            start,
        )

    def _solve(self, layer: int, keys: RoutedKeys, residual: Tensor) -> Any:
        # Each fact counts once however many contexts it has: the objective is a mean over its contexts.
        weight = 1 / sqrt(self.per_fact)
        keys = RoutedKeys(keys.expert, keys.gate * weight, keys.key)
        places = FactPlaces(
            self.view, self.sequences, self.positions, pad_id(self.tok), self.hparams.capture_batch_size
        )
        tail = self.prepared.layers[layer].tail
        residual = tail.pull_back(layer, residual.to(keys.key.device), weight, places)
        self.keys[layer], self.residuals[layer] = keys, residual
        before = self._keys_before(layer, tail.reach, weight)
        if before:
            everything = RoutedKeys.cat([*before, keys])
            kept = residual.new_zeros(everything.num_tokens - keys.num_tokens, residual.shape[1])
            keys, residual = everything, torch.cat([kept, residual])
        held = self.memory.rows(layer, [fact.prompt for fact in self.facts])
        solution, report = self.editor.solve_beside(layer, held, keys, residual, self.prepared.layers[layer])
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

    def _write(self, layer: int, solution: Any, share: float) -> None:
        with self.watch.stage("write"):
            update = self.editor.place(solution, self.prepared.layers[layer])
        if layer in self.keys:
            with self.watch.stage("diagnose"):
                self.fits[layer] = Fit.of(update, self.keys[layer], self.residuals.pop(layer))
        with self.watch.stage("write"):
            self.writer.write(layer, update.scale(share) if share != 1.0 else update)
