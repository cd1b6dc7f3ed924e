"""What gradient-based methods share: examples, the loss, float32 masters, the loop over steps, and scopes around it.

Trained values live in float32 whatever the dtype of the weights, and Adam's state beside them; the weights get the
rounded values after each step. With bf16 weights a step of 1e-4 would otherwise be lost to rounding most of the time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.editors.base import Editor, EditResult, provenance
from easyedit_moe.editors.diagnosis import FactDiagnosis
from easyedit_moe.editors.planner import MemoryPlan, Workload
from easyedit_moe.editors.training_diagnosis import diagnose_tensors
from easyedit_moe.editors.training_planner import Trained, plan_training
from easyedit_moe.errors import NumericalError, not_finite
from easyedit_moe.evaluation.scoring import answer_logits
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.facts.tokens import pad_id
from easyedit_moe.hparams import TrainingHyperParams
from easyedit_moe.measure import Stopwatch
from easyedit_moe.moe.capture import inference_mode_of
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.shapes import shapes_of
from easyedit_moe.patches.tensors import TensorWriter, writing_tensors
from easyedit_moe.progress import progress_bar
from easyedit_moe.targets.search import check_lengths, fact_contexts


@dataclass(frozen=True)
class Example:
    """One text to learn: the ids of a (prefixed) prompt, and of the answer that should follow."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """Where training stands after an update: its number from 1, and the loss before it."""

    number: int
    loss: float


@dataclass(frozen=True)
class Answer:
    """How a model answers one fact: the mean NLL per token of the answer over all contexts, and whether, after the bare
    prompt, each of its tokens is the most likely one.
    """

    nll: float
    most_likely: bool


class TrainingEditor(Editor):
    """Base of the editors that minimise the NLL of the new answers by gradient descent."""

    hparams: TrainingHyperParams

    @classmethod
    def plan_for(cls, hparams: Any, model: nn.Module, workload: Workload) -> MemoryPlan:
        """See `Editor.plan_for`; earlier edits need nothing."""
        view = MoELayerView(model, without_weights=True)
        cls.check_layers(hparams, view)
        # The gradient passes the MoE layers above a dense one, too.
        shapes = shapes_of(model, [n for n in hparams.layers if n in view.layers] or sorted(view.layers))
        return plan_training(shapes, hparams, cls.trained(hparams, view), workload)

    @classmethod
    @abstractmethod
    def trained(cls, hparams: Any, view: MoELayerView) -> Trained:
        """What is trained on a model, of which only shapes are read."""

    @abstractmethod
    def train(
        self, view: MoELayerView, tok: PreTrainedTokenizerBase, facts: Sequence[EditRequest], job: TrainingJob
    ) -> Mapping[str, Tensor]:
        """New values (float32) of the parameters that changed, by full name.

        Parameters of the model that change on the way have been handed to ``job.writer.keep`` before.
        """

    def edit_batch(
        self, model: nn.Module, tok: PreTrainedTokenizerBase, facts: list[EditRequest], memory: Any, targets: Any
    ) -> EditResult:
        """Train; ``memory`` is unused, as a batch only needs the weights that the one before left.

        Raises what the layer view raises, and NumericalError for a loss that is not finite.
        """
        view, watch = MoELayerView(model), Stopwatch()
        self.check_layers(self.hparams, view)
        examples = examples_of(tok, facts, self.hparams.context_prefixes, self.hparams.chat)
        check_lengths(view, [len(e.prompt) + len(e.answer) for group in examples for e in group])
        with writing_tensors(model) as writer:
            job = TrainingJob(self.hparams, model, pad_id(tok), examples, writer, self.progress)
            with watch.stage("diagnose"):
                before = job.answers()
            with watch.stage("solve"):
                values = self.train(view, tok, facts, job)
            with watch.stage("write"):
                for name, value in values.items():
                    writer.write(name, value)
                patch = writer.finish(provenance(self.hparams, facts))
            with watch.stage("diagnose"):
                learnt = [
                    FactDiagnosis(fact.prompt, fact.target_new, old.nll, new.nll, new.most_likely, old.most_likely)
                    for fact, old, new in zip(facts, before, job.answers(), strict=True)
                ]
                diagnosis = diagnose_tensors(self.hparams, model, learnt, patch, job.steps)
            return EditResult(patch, watch.seconds, diagnosis=diagnosis)


class TrainingJob:
    """One batch of edits: its examples, and the loop that fits parameters to them.

    Attributes:
        steps: updates made.
    """

    def __init__(
        self,
        hparams: TrainingHyperParams,
        model: nn.Module,
        pad: int,
        examples: Sequence[Sequence[Example]],
        writer: TensorWriter,
        progress: bool,
    ) -> None:
        self.hparams, self.model, self.pad, self.examples = hparams, model, pad, examples
        self.writer, self.progress = writer, progress
        self.steps = 0

    @property
    def total_steps(self) -> int:
        """Updates that are made unless all examples are learnt before."""
        hp, count = self.hparams, len(self.examples)
        size = 1 if hp.order == "depth_first" else hp.train_batch_size
        every = hp.num_steps * -(-count // size)
        return min(every, hp.num_updates) if hp.num_updates else every

    def fit(
        self,
        masters: Masters,
        after_step: Callable[[Step], None] = lambda step: None,
        penalty: Callable[[], Tensor] | None = None,
    ) -> None:
        """Minimise the mean NLL per answer token, averaged over facts, plus ``penalty``, by Adam.

        ``order`` minibatch: each of ``num_steps`` epochs passes over all facts in random batches. depth_first: one fact
        after the other gets ``num_steps`` steps of its own and a fresh optimiser. Either stops where the mean loss of
        an epoch is below ``early_stop_loss``; a batch below it makes no step. After ``num_updates`` steps both stop.

        Raises:
            NumericalError: a loss or gradient that is not finite.
        """
        hp, everything = self.hparams, list(range(len(self.examples)))
        draw = torch.Generator().manual_seed(hp.seed)
        groups = [[t] for t in everything] if hp.order == "depth_first" else [everything]
        size = 1 if hp.order == "depth_first" else hp.train_batch_size
        with progress_bar(self.total_steps, "training", "step", self.progress) as bar:
            for group in groups:
                optimiser = masters.adam(hp.lr, hp.weight_decay)
                for _ in range(hp.num_steps):
                    order = [group[i] for i in torch.randperm(len(group), generator=draw).tolist()]
                    losses = []
                    for start in range(0, len(order), size):
                        chosen = order[start : start + size]
                        if hp.num_updates and self.steps == hp.num_updates:
                            return
                        nll = self.nll(chosen)
                        losses += [finite_loss(nll)] * len(chosen)
                        bar.update()
                        if losses[-1] < hp.early_stop_loss:
                            continue
                        self.steps += 1
                        masters.step(optimiser, [nll if penalty is None else nll + penalty().to(nll.device)])
                        after_step(Step(self.steps, losses[-1]))
                        masters.clear()
                    if sum(losses) / len(losses) < hp.early_stop_loss:
                        break

    def nll(self, chosen: Sequence[int]) -> Tensor:
        """Mean over facts (and their contexts) of the mean NLL per token of the answer."""
        return self._scored(chosen)[0].mean()

    @torch.no_grad()
    def answers(self) -> list[Answer]:
        """How the model answers each fact as it is now, ``train_batch_size`` facts at a time."""
        size, found = self.hparams.train_batch_size, []
        with inference_mode_of(self.model):
            for start in range(0, len(self.examples), size):
                chosen = range(start, min(start + size, len(self.examples)))
                losses, right = self._scored(chosen)
                counts = [len(self.examples[t]) for t in chosen]
                means = torch.stack([nll.mean() for nll in losses.split(counts)])
                hits = torch.stack([own[0] for own in right.split(counts)])
                # Read at once: each read of a device waits for it.
                pairs = torch.stack([means, hits.to(means)]).T.tolist()
                found += [Answer(nll, hit == 1) for nll, hit in pairs]
        return found

    def _scored(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Per example of the facts ``chosen``: mean NLL per token of the answer, and whether each is most likely."""
        rows = [(e.prompt, e.answer) for t in chosen for e in self.examples[t]]
        logits, labels = answer_logits(self.model, rows, self.pad)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        right = ((logits.argmax(-1) == labels) | (labels == -100)).all(1)
        return losses.sum(1) / (labels != -100).sum(1), right


class Masters:
    """Float32 values that are trained in place of parameters, whole or some of their first dimension's slices.

    A whole float32 parameter is its own master. Adam's state is float32, too.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], slices: Mapping[str, Tensor] | None = None) -> None:
        self.parameters = dict(parameters)
        self.slices = {name: index.to(self.parameters[name].device) for name, index in (slices or {}).items()}
        self.values: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            value = parameter.detach()
            value = value[self.slices[name]] if name in self.slices else value
            self.values[name] = value.float()

    def adam(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """A fresh optimiser over all masters."""
        return torch.optim.Adam(list(self.values.values()), lr=lr, weight_decay=weight_decay)

    def step(self, optimiser: torch.optim.Optimizer, losses: Iterable[Tensor]) -> None:
        """One update by the gradient of the sum of ``losses``, each of which is freed before the next is made.

        The gradients stay beside the masters until `clear`.

        Raises:
            NumericalError: a gradient that is not finite.
        """
        self.clear()
        for loss in losses:
            found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
            for name, gradient in zip(self.parameters, found, strict=True):
                if gradient is None:
                    continue
                value = self.values[name]
                gradient = (gradient[self.slices[name]] if name in self.slices else gradient).float()
                value.grad = gradient if value.grad is None else value.grad.add_(gradient)
        for value in self.values.values():
            if value.grad is not None and not torch.isfinite(value.grad).all():
                raise not_finite("A gradient is NaN or infinite")
        optimiser.step()
        self.push()

    def clear(self) -> None:
        """Drop the gradients of the last step."""
        for value in self.values.values():
            value.grad = None

    def pull(self) -> None:
        """Take over what was changed in whole parameters themselves."""
        for name, parameter in self.parameters.items():
            if name not in self.slices:
                self.values[name].copy_(parameter.detach())

    def push(self) -> None:
        """Round the masters into their parameters."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                value = self.values[name]
                if name in self.slices:
                    parameter.data[self.slices[name]] = value.to(parameter.dtype)
                elif value.data_ptr() != parameter.data_ptr():
                    parameter.data.copy_(value)

    def whole(self) -> dict[str, Tensor]:
        """Float32 values of whole parameters; slices that were not trained are as they are in the model."""
        out = {}
        for name, parameter in self.parameters.items():
            if name in self.slices:
                out[name] = parameter.detach().float().clone()
                out[name][self.slices[name]] = self.values[name]
            else:
                out[name] = self.values[name]
        return out


def examples_of(
    tok: PreTrainedTokenizerBase, facts: Sequence[EditRequest], prefixes: Sequence[str], chat: bool = False
) -> list[list[Example]]:
    """Per fact: the bare prompt and, behind each prefix, the prompt again, all with the new answer.

    Raises:
        RequestError: a prefix that mentions the subject, a blank target, or ``chat`` without a template.
    """
    out = []
    for fact in facts:
        out.append([Example(c.ids, c.answer) for c in fact_contexts(tok, fact, prefixes, "last", chat)])
    return out


def finite_loss(loss: Tensor) -> float:
    """The loss as a number; NumericalError where it is none."""
    value = float(loss.detach())
    if not isfinite(value):
        raise NumericalError(
            "The training loss is NaN or infinite; nothing was kept of this edit. Lower the learning rate, or load the "
            "model in bfloat16 or float32."
        )
    return value
