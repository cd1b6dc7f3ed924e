"""What the solvers for expert weights share: prepare, find targets, loop over the critical layers, write.

A method only says how one layer's system is solved (:meth:`SolvingEditor.solve`) and how a solution is placed in
a layer (:meth:`SolvingEditor.place`).
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.algebra.metric import IdentityMetric, Metric, covariance_metric
from easyedit_moe.algebra.nullspace import null_space
from easyedit_moe.algebra.routed_keys import FactoredUpdate, RoutedKeys
from easyedit_moe.algebra.tucker import TuckerBasis
from easyedit_moe.editors.base import Editor, EditResult
from easyedit_moe.editors.planner import plan, shapes_of
from easyedit_moe.editors.prepared import EditMemory, Prepared
from easyedit_moe.errors import LayerError, LayoutError, RequestError
from easyedit_moe.facts.requests import EditRequest, parse_requests
from easyedit_moe.facts.tokens import encode_text, pad_id
from easyedit_moe.hparams import SolverHyperParams
from easyedit_moe.measure import Stopwatch
from easyedit_moe.moe.capture import FactStates, LayerInputs, capture_facts
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.probe import check_keys, residual_gain, starts_anywhere
from easyedit_moe.patches.weights import PatchWriter, writing
from easyedit_moe.statistics.gather import layer_statistics
from easyedit_moe.statistics.moments import LayerMoments
from easyedit_moe.targets.cache import cached_targets
from easyedit_moe.targets.search import TargetSettings, TargetVectors, compute_targets, fact_contexts

logger = logging.getLogger(__name__)


class SolvingEditor(Editor):
    """Base of the editors that solve for the experts' down-projections.

    What was prepared on one model is not used on another: then it is prepared anew.
    """

    def __init__(self, hparams: SolverHyperParams, prepared: Prepared | None = None, progress: bool = True) -> None:
        super().__init__(hparams, progress)
        self.prepared = prepared

    @abstractmethod
    def solve(self, keys: RoutedKeys, residual: Tensor, layer: int, prepared: Prepared) -> tuple[Any, Any]:
        """A solution of one layer's system for T keys and residuals ``[T, d]``, and a report or None."""

    def place(self, solution: Any, layer: int, prepared: Prepared) -> FactoredUpdate:
        """The update of ``layer`` that a solution means; the solution itself unless a method says otherwise."""
        return solution

    def prepare(self, model: nn.Module, tok: PreTrainedTokenizerBase) -> Prepared:
        """Check the layers, collect or read statistics, build metrics and bases; kept for later batches.

        Raises:
            LayoutError, LayerError, DataError, CacheError, NumericalError, HyperParamsError: see the parts.
        """
        watch = Stopwatch()
        with watch.stage("statistics"):
            view = MoELayerView(model)
            self._check_model(view)
            self._log_plan(view)
            layers = self.hparams.layers
            probe = encode_text(tok, "The quick brown fox jumps over the lazy dog.")[:32]
            gains = {}
            for layer in layers:
                check_keys(view, layer, probe, pad_id(tok))
                gains[layer] = residual_gain(view, layer, probe, pad_id(tok))
            resumable = starts_anywhere(view, layers, probe, pad_id(tok))
            fingerprint = model_fingerprint(view)
            moments = {}
            if self._needs_statistics():
                moments = layer_statistics(view, tok, self.hparams, layers, fingerprint, self.progress)
            metrics = {layer: self._metric(moments.get(layer)) for layer in layers}
            bases = {layer: self._basis(view, layer, moments.get(layer), fingerprint) for layer in layers}
        kept = {layer: basis for layer, basis in bases.items() if basis is not None}
        experts = {layer: view.layers[layer].experts.layout.num_experts for layer in layers}
        self.prepared = Prepared(
            fingerprint, experts, gains, metrics, kept, moments, resumable, watch.seconds["statistics"]
        )
        return self.prepared

    def edit(
        self,
        model: nn.Module,
        tok: PreTrainedTokenizerBase,
        requests: Sequence[Any],
        memory: EditMemory | None = None,
        targets: TargetVectors | None = None,
    ) -> EditResult:
        """See :meth:`Editor.edit`; raises what :meth:`prepare` and the solvers raise, too."""
        facts = parse_requests(requests)
        if targets is not None and len(targets.delta) != len(facts):
            raise RequestError(f"There are {len(targets.delta)} target vectors for {len(facts)} requests.")
        watch, view = Stopwatch(), MoELayerView(model)
        self._check_model(view)
        with watch.stage("statistics"):
            if self.prepared is None or self.prepared.fingerprint != model_fingerprint(view):
                self.prepare(model, tok)
        prepared = self.prepared
        group = getattr(self.hparams, "edits_per_solve", None) or len(facts)
        used, reports, seen = [], [], {}
        memory = memory or EditMemory()
        with writing(view) as writer:
            for start in range(0, len(facts), group):
                chunk = facts[start : start + group]
                job = _Job(self, view, tok, chunk, prepared, memory.extended(seen), writer, watch)
                used.append(job.find_targets() if targets is None else targets.rows(start, start + group))
                job.aim(used[-1])
                job.spread()
                reports += job.reports
                for layer, keys in job.keys.items():
                    seen.setdefault(layer, []).append(keys)
            with watch.stage("write"):
                patch = writer.finish(self._provenance(facts), prepared.fingerprint)
        kept = memory.extended(seen) if self.hparams.remember_edits else memory
        return EditResult(patch, watch.seconds, kept, used, reports)

    def target_settings(self) -> tuple[int, tuple[str, ...], TargetSettings]:
        """All that target vectors depend on besides model and requests: layer, context prefixes, optimisation."""
        hp = self.hparams
        settings = TargetSettings(
            hp.v_num_grad_steps, hp.v_lr, hp.kl_factor, hp.v_weight_decay, hp.clamp_norm_factor, hp.early_stop_loss,
            hp.target_batch_size, hp.fact_token,
        )  # fmt: skip
        return hp.layers[-1], tuple(hp.context_prefixes), settings

    def _log_plan(self, view: MoELayerView) -> None:
        if not logger.isEnabledFor(logging.INFO):
            return
        try:
            found = plan(shapes_of(view.model, self.hparams.layers), self.hparams)
        except LayoutError as error:  # a config that does not tell the sizes is no reason not to edit
            logger.info("No memory plan: %s", error)
        else:
            logger.info("%s", found.summary())

    def _needs_statistics(self) -> bool:
        return self.hparams.metric != "identity" or getattr(self.hparams, "whitening", "none") != "none"

    def _metric(self, moments: LayerMoments | None) -> Metric:
        hp = self.hparams
        if hp.metric == "identity":
            return IdentityMetric()
        if hp.metric == "covariance":
            return covariance_metric(
                moments.keys, moments.counts, hp.covariance_ridge, hp.min_coverage, hp.low_coverage
            )
        return null_space(
            moments.keys,
            moments.counts,
            hp.nullspace_threshold,
            hp.nullspace_relative,
            hp.min_coverage,
            hp.low_coverage,
        )

    def _basis(
        self, view: MoELayerView, layer: int, moments: LayerMoments | None, fingerprint: str
    ) -> TuckerBasis | None:
        return None

    def _check_model(self, view: MoELayerView) -> None:
        view.require(self.hparams.layers)
        wanted = self.hparams.v_loss_layer
        if wanted is not None and wanted != view.num_layers - 1:
            raise LayerError(
                f"v_loss_layer must be the last layer ({view.num_layers - 1}) or None, since targets are read from the "
                f"model's own logits; found {wanted}."
            )

    def _provenance(self, facts: Sequence[EditRequest]) -> dict[str, Any]:
        return {"hparams": self.hparams.to_dict(), "requests": [vars(fact) for fact in facts]}


class _Job:
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

    def find_targets(self) -> TargetVectors:
        layer, prefixes, settings = self.editor.target_settings()
        folder, progress = self.hparams.target_cache_dir, self.editor.progress
        with self.watch.stage("targets"):
            if folder is None:
                return compute_targets(self.view, self.tok, self.facts, layer, prefixes, settings, progress)
            name, fingerprint = self.hparams.model_name, self.prepared.fingerprint
            return cached_targets(
                folder, name, fingerprint, self.view, self.tok, self.facts, layer, prefixes, settings, progress
            )

    def aim(self, targets: TargetVectors) -> None:
        """Take the shifts to reach, and lay out every context in which each fact is captured."""
        hp = self.hparams
        contexts = [
            context
            for fact in self.facts
            for context in fact_contexts(self.tok, fact, hp.context_prefixes, hp.fact_token)
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
                state = self._capture(layers[-1])
                solution = self._solve(layers[-1], state.keys[layers[-1]], self.delta)
            for left, layer in zip(range(len(layers), 0, -1), layers, strict=True):
                self._write(layer, solution, 1 / left)
            return
        wanted: Tensor | None = None
        written: int | None = None
        for left, layer in zip(range(len(layers), 0, -1), layers, strict=True):
            with self.watch.stage("solve"):
                state = self._capture(layer, written)
                output = state.outputs[layers[-1]]
                if wanted is None:
                    wanted = output + self.delta.to(output.device)
                solution = self._solve(layer, state.keys[layer], (wanted - output) / left)
            self._write(layer, solution, 1.0)
            written = layer

    def _capture(self, layer: int, start: int | None = None) -> FactStates:
        last = self.hparams.layers[-1]
        return capture_facts(
            self.view,
            self.sequences,
            self.positions,
            [layer],
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
        residual = residual.to(keys.key.device) * (weight / self.prepared.gains[layer])
        self.keys[layer] = keys
        earlier = self.memory.keys.get(layer, [])
        if earlier:
            everything = RoutedKeys.cat([*earlier, keys])
            kept = residual.new_zeros(everything.num_tokens - keys.num_tokens, residual.shape[1])
            keys, residual = everything, torch.cat([kept, residual])
        solution, report = self.editor.solve(keys, residual, layer, self.prepared)
        if report is not None:
            self.reports.append(report)
        return solution

    def _write(self, layer: int, solution: Any, share: float) -> None:
        with self.watch.stage("write"):
            update = self.editor.place(solution, layer, self.prepared)
            self.writer.write(layer, update.scale(share) if share != 1.0 else update)
