"""UnKE (arXiv 2405.15349) on MoE layers: find the hidden state that makes the answer, then fit a layer to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.editors.base import Editor, EditResult, provenance
from easyedit_moe.editors.diagnosis import FactDiagnosis
from easyedit_moe.editors.measuring import residual_shares
from easyedit_moe.editors.planner import MemoryPlan, Workload
from easyedit_moe.editors.stages import Stage, targets_stage
from easyedit_moe.editors.trainable import check_writable, expert_parameters, trainable
from easyedit_moe.editors.training import Masters, finite_loss
from easyedit_moe.editors.training_diagnosis import diagnose_tensors
from easyedit_moe.editors.training_planner import (
    Trained,
    held_between_steps,
    originals_stage,
    step_bytes,
    values_stage,
)
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.facts.subjects import mentions
from easyedit_moe.facts.tokens import collate, encode_text, pad_id
from easyedit_moe.hparams import UnKEHyperParams
from easyedit_moe.measure import Stopwatch
from easyedit_moe.moe.activations import inference, kept_for_gradient, passing
from easyedit_moe.moe.capture import hooks, run, stop_after
from easyedit_moe.moe.layer_outputs import layer_output
from easyedit_moe.moe.layers import MoELayer, MoELayerView
from easyedit_moe.moe.shapes import Shapes, shapes_of
from easyedit_moe.patches.tensors import writing_tensors
from easyedit_moe.progress import progress_bar
from easyedit_moe.statistics.generated import SAMPLED_TOKENS, corpus_texts
from easyedit_moe.targets.cache import found_targets
from easyedit_moe.targets.memory import USUAL_SEQUENCES
from easyedit_moe.targets.search import (
    TargetSettings,
    TargetVectors,
    check_lengths,
    fact_contexts,
    outcomes,
)


class UnKEEditor(Editor):
    """Stage 1 finds target vectors z at the layer's output, stage 2 fits the layer's parameters to them.

    Stage 2 minimises ``sum_t ||f(x_t) - z_t||^2 + preserve_weight * sum_s ||f(x_s) - f_0(x_s)||^2`` by Adam. f is the
    decoder layer, f_0 the same before this batch, t the fact tokens, s all other tokens of the edited prompts and all
    tokens of the preserved texts, except texts that mention an edited subject. Each step sees all of them; x does not
    change, as nothing below is edited.

    Where it differs from the paper and EasyEdit's code: the paper trains the whole layer; here ``train`` says what, by
    default the routed experts, so that attention and router stay. z is shifted at the last subject token by default
    (paper: at the prompt's last token, ``fact_token: last``), which here serves other prompts of the same subject, too.
    Stage 1 is this package's search of target vectors, for all requests at once, without KL term by default. Masters
    are float32.
    """

    method = "UnKE"
    hparams: UnKEHyperParams

    def needs_subject(self) -> bool:
        """Not where the state is shifted at the prompt's last token, and the KL term, which asks of it, is off."""
        return self.hparams.fact_token != "last" or self.hparams.kl_factor > 0

    def __init__(self, hparams: UnKEHyperParams, progress: bool = True) -> None:
        super().__init__(hparams, progress)
        vars(self)["edits"] = "layer" if hparams.train == "layer" else "experts"

    @classmethod
    def plan_for(cls, hparams: UnKEHyperParams, model: nn.Module, workload: Workload) -> MemoryPlan:
        """See `Editor.plan_for`: the search, then the fit, with the layer's inputs and outputs held."""
        hp, shapes = hparams, shapes_of(model, hparams.layers)
        edits = workload.edits_of(hp)
        (moe,) = MoELayerView(model, without_weights=True).require(hp.layers)
        trained = Trained.of(trained_parameters(moe, hp.train).values())
        contexts, most = len(hp.context_prefixes) + 1, hp.target_batch_size or USUAL_SEQUENCES
        fit = _fit_stage(shapes, hp, trained, edits * contexts, workload)
        stages = (
            targets_stage(shapes, hp.layers[0], edits, contexts, workload.lengths, most),
            originals_stage(trained),
            fit,
            values_stage(trained, shapes.itemsize),
        )
        settings = {"target_batch_size": most, "train_batch_size": hp.train_batch_size}
        return MemoryPlan(shapes, tuple(hp.layers), edits, stages, settings, workload.checked_budget())

    def edit_batch(
        self, model: nn.Module, tok: PreTrainedTokenizerBase, facts: list[EditRequest], memory: Any, targets: Any
    ) -> EditResult:
        """Find the hidden states, then fit the layer to them.

        Raises what the layer view and `found_targets` raise, DataError for unusable ``preserve_dataset``, and
        NumericalError for a loss that diverges.
        """
        hp, view, watch = self.hparams, MoELayerView(model), Stopwatch()
        (moe,) = view.require(hp.layers)
        parameters = trained_parameters(moe, hp.train)
        check_writable(parameters)
        with writing_tensors(model) as writer:
            with watch.stage("statistics"):
                texts = self._preserved(model, tok, facts)
            if targets is None:
                with watch.stage("targets"):
                    targets = found_targets(hp, self.target_settings(), view, tok, facts, self.progress)
            with watch.stage("solve"):
                problem = self._problem(view, tok, facts, targets, texts)
                for name in parameters:
                    writer.keep(name)
                with trainable(model, parameters.values()):
                    values = self._fit(moe.layer, parameters, problem)
            with watch.stage("write"):
                for name, value in values.items():
                    writer.write(name, value)
                patch = writer.finish(provenance(hp, facts, [targets]))
            with watch.stage("diagnose"):
                with trainable(model), torch.no_grad():
                    shares = _residual_shares(moe.layer, problem, targets.delta)
                told = zip(outcomes(facts, targets), shares, strict=True)
                found = [FactDiagnosis(**vars(outcome), residual_share=share) for outcome, share in told]
                diagnosis = diagnose_tensors(hp, model, found, patch, int(targets.steps.max()))
            return EditResult(patch, watch.seconds, targets=[targets], diagnosis=diagnosis)

    def target_settings(self) -> tuple[int, tuple[str, ...], TargetSettings]:
        """All that target vectors depend on besides model and requests: layer, context prefixes, optimisation."""
        hp = self.hparams
        return hp.layers[0], tuple(hp.context_prefixes), TargetSettings.of(hp)

    def _preserved(
        self, model: nn.Module, tok: PreTrainedTokenizerBase, facts: Sequence[EditRequest]
    ) -> list[list[int]]:
        """Token ids of the texts to preserve, without those on an edited subject, which would ask for the opposite."""
        hp = self.hparams
        if not hp.preserve_n_samples or not hp.preserve_weight:
            return []
        texts = corpus_texts(hp.preserve_dataset, hp.preserve_n_samples, model, tok, min(hp.max_length, SAMPLED_TOKENS))
        subjects = [fact.subject for fact in facts if fact.subject is not None]
        kept = [text for text in texts if not any(mentions(text, subject) for subject in subjects)]
        return [encode_text(tok, text)[: hp.max_length] for text in kept]

    def _problem(
        self,
        view: MoELayerView,
        tok: PreTrainedTokenizerBase,
        facts: Sequence[EditRequest],
        targets: TargetVectors,
        texts: Sequence[Sequence[int]],
    ) -> list[_Part]:
        """The layer's inputs and wanted outputs, a batch of token sequences at a time."""
        hp = self.hparams
        rows: list[tuple[Sequence[int], int, int]] = [(ids, -1, -1) for ids in texts if ids]
        for t, fact in enumerate(facts):
            for context in fact_contexts(tok, fact, hp.context_prefixes, hp.fact_token, hp.chat):
                rows.append((context.ids, context.fact, t))
        check_lengths(view, [len(ids) for ids, _, _ in rows])
        rows.sort(key=lambda row: len(row[0]))
        per_fact, parts = len(hp.context_prefixes) + 1, []
        with trainable(view.model), torch.no_grad():
            for start in range(0, len(rows), hp.train_batch_size):
                chosen = rows[start : start + hp.train_batch_size]
                parts.append(self._part(view, chosen, targets, pad_id(tok), 1 / per_fact))
        return parts

    def _part(
        self,
        view: MoELayerView,
        rows: Sequence[tuple[Sequence[int], int, int]],
        targets: TargetVectors,
        pad: int,
        fact_weight: float,
    ) -> _Part:
        batch = collate([ids for ids, _, _ in rows], pad)
        layer = view.decoder_layers[self.hparams.layers[0]]
        caught: dict[str, Any] = {}
        with hooks() as handles:
            handles.append(
                layer.register_forward_pre_hook(lambda _, a, k: caught.update(args=a, kwargs=k), with_kwargs=True)
            )
            handles.append(layer.register_forward_hook(lambda _, __, out: caught.update(out=layer_output(out))))
            handles.append(stop_after(layer))
            run(view.model, batch)
        wanted = caught["out"].detach().float().clone()
        weight = batch.mask.to(wanted.device).float() * self.hparams.preserve_weight
        for i, (_, fact, t) in enumerate(rows):
            if t >= 0:
                wanted[i, fact] += targets.delta[t].to(wanted.device)
                weight[i, fact] = fact_weight  # each fact counts once, however many contexts it has
        where = [(i, fact, t) for i, (_, fact, t) in enumerate(rows) if t >= 0]
        return _Part(caught["args"], caught["kwargs"], wanted, weight, where)

    def _fit(
        self, layer: nn.Module, parameters: dict[str, nn.Parameter], problem: Sequence[_Part]
    ) -> dict[str, Tensor]:
        hp = self.hparams
        masters = Masters(parameters)
        optimiser = masters.adam(hp.lr, 0.0)
        scale = 1 / sum(float(part.weight.sum()) for part in problem)
        with progress_bar(hp.optim_num_step, "fitting", "step", self.progress) as bar:
            for _ in range(hp.optim_num_step):
                masters.step(optimiser, _losses(layer, problem, scale))
                masters.clear()
                bar.update()
        return masters.whole()


def _fit_stage(shapes: Shapes, hp: UnKEHyperParams, trained: Trained, prompts: int, workload: Workload) -> Stage:
    """Steps of Adam on one layer, whose inputs and wanted outputs of all texts are held; texts of full length."""
    texts = hp.preserve_n_samples if hp.preserve_weight else 0
    padded = max(workload.lengths.prompt, min(hp.max_length, SAMPLED_TOKENS) if texts else 0)
    tokens = (prompts + texts) * padded
    together = min(hp.train_batch_size, prompts + texts) * padded
    item, d, h, k = shapes.itemsize, shapes.d_model, shapes.d_hidden, shapes.active
    held = tokens * (d * (item + 4) + 4)
    kept = kept_for_gradient(shapes, together, together, together) + together * k * item * (d + h)
    running = kept + passing(shapes, together) + 4 * together * (5 * d + shapes.queries)
    update = held_between_steps(trained) + max(running, step_bytes(trained, workload.device_of(hp)))
    values = 0 if trained.itemsize == 4 else 4 * trained.numbers
    working = held + max(inference(shapes, together), update)
    note = f"{trained.numbers:,} trainable numbers; layer inputs and outputs of all texts"
    return Stage("train", values + held, working - values - held, note)


def trained_parameters(moe: MoELayer, train: str) -> dict[str, nn.Parameter]:
    """What stage 2 trains, by full name: all of the decoder layer, or a part of its routed experts."""
    if train == "layer":
        return {f"{moe.name}.{name}": parameter for name, parameter in moe.layer.named_parameters()}
    return expert_parameters(moe, train)


@dataclass(frozen=True)
class _Part:
    """A batch: what the layer is called with, the outputs wanted ``[B, S, d]`` and each token's weight ``[B, S]``, and
    of each fact token its row, its position and its fact.
    """

    args: tuple
    kwargs: dict[str, Any]
    wanted: Tensor
    weight: Tensor
    facts: Sequence[tuple[int, int, int]]


def _losses(layer: nn.Module, problem: Sequence[_Part], scale: float) -> Iterator[Tensor]:
    for part in problem:
        output = layer_output(layer(*part.args, **part.kwargs))
        loss = scale * (part.weight * ((output.float() - part.wanted) ** 2).sum(-1)).sum()
        finite_loss(loss)
        yield loss


def _residual_shares(layer: nn.Module, problem: Sequence[_Part], delta: Tensor) -> list[float | None]:
    """Per fact, the share of the shift ``delta [T, d]`` that the layer's output now makes, the mean over contexts."""
    states: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for part in problem:
        output = layer_output(layer(*part.args, **part.kwargs))
        for i, position, t in part.facts:
            shift = delta[t].to(part.wanted.device)
            states.setdefault(t, []).append((part.wanted[i, position] - shift, output[i, position].float()))
    pairs = [pair for t in sorted(states) for pair in states[t]]
    before, after = (torch.stack(column) for column in zip(*pairs, strict=True))
    per_fact = len(pairs) // len(delta)
    return residual_shares(before, after, delta.repeat_interleave(per_fact, dim=0), per_fact)


apply_unke_to_model = UnKEEditor.apply_to_model
