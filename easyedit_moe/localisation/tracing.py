"""Causal tracing (Meng et al. 2022, ROME, section 2) of MoE blocks and of single experts.

The embeddings of the subject's tokens get noise, which makes the model's answer less likely. Then, at one layer and at
the fact token only, the MoE block's output (or one expert's part of it) is put back to what it was without noise. How
much more likely the answer becomes is the indirect effect of that layer (or expert).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import DataError, LayoutError, not_finite
from easyedit_moe.evaluation.means import Mean
from easyedit_moe.evaluation.scoring import answer_logits
from easyedit_moe.facts.tokens import pad_id
from easyedit_moe.localisation.prompts import TracedFact
from easyedit_moe.moe.capture import (
    Routing,
    hooks,
    inference_mode_of,
    model_device,
    read_routing,
)
from easyedit_moe.moe.embeddings import input_embeddings
from easyedit_moe.moe.experts import ModuleListExperts
from easyedit_moe.moe.layer_outputs import layer_output, replace_layer_output
from easyedit_moe.moe.layers import MoELayer, MoELayerView


@dataclass(frozen=True)
class TraceSettings:
    """How facts are traced.

    Attributes:
        noise: standard deviation of the noise, as a multiple of that of the subjects' embeddings. ROME: 3.
        samples: draws of the noise per fact. ROME: 10.
        seed: of the draws; those of a fact do not depend on the other facts.
        batch_size: token sequences in one forward.

    Raises:
        DataError: on construction, for a value out of range.
    """

    noise: float = 3.0
    samples: int = 10
    seed: int = 0
    batch_size: int = 128

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch_size < 1 or not 0 < self.noise < float("inf"):
            raise DataError(
                f"Tracing takes samples and a batch size of at least 1 and noise greater than 0; found {self.samples}, "
                f"{self.batch_size} and {self.noise}."
            )


@dataclass(frozen=True)
class LayerTrace:
    """Effect of restoring the whole MoE output of one layer, in points of probability (percent), a mean over facts.

    Attributes:
        layer: its index.
        clean: probability of the answer without noise.
        corrupted: with noise.
        restored: with noise, and the layer's MoE output at the fact token as without.
        effect: restored less corrupted.
    """

    layer: int
    clean: Mean
    corrupted: Mean
    restored: Mean
    effect: Mean


@dataclass(frozen=True)
class ExpertTrace:
    """Effect of restoring what one expert adds, in points of probability (percent).

    Attributes:
        layer, expert: which.
        effect: a mean over the facts that are routed to it without noise.
        facts: how many those are.
        total: sum of their effects over the number of all facts, by which experts can be ranked.
    """

    layer: int
    expert: int
    effect: Mean
    facts: int
    total: float


@dataclass(frozen=True)
class _Seen:
    """What a layer did at the fact tokens of R rows: ``block [R, d]``, None unless asked for, and the routing."""

    block: dict[int, Tensor]
    routing: dict[int, Routing]


Change = Callable[[Tensor, Tensor], Tensor]
"""From the rows of a chunk and what a module put out at their fact tokens ``[n, d]`` to what it shall put out."""


class CausalTracing:
    """Tracing of some facts on one model, which is only read; what lies before every restoration is computed once.

    A probability is the geometric mean over the answer's tokens, teacher-forced, as in all scores of this package.

    Args:
        view: of the model.
        tok: its tokenizer.
        facts: at least one.
        layers: MoE layers that can be traced.
        settings: see `TraceSettings`.

    Raises:
        DataError: no fact, or settings out of range. LayerError: a layer that is not one of experts. NumericalError: a
            probability that is not finite.

    Attributes:
        clean: ``[T]``, probability of each fact's answer.
        corrupted: ``[T, samples]``, with noise.
        sigma: standard deviation of the noise.
    """

    def __init__(
        self,
        view: MoELayerView,
        tok: PreTrainedTokenizerBase,
        facts: Sequence[TracedFact],
        layers: Sequence[int],
        settings: TraceSettings,
    ) -> None:
        if not facts:
            raise DataError("There is no fact to trace: each needs a subject, and an answer that the model gives.")
        view.require(layers)
        self.view, self.facts, self.layers, self.settings = view, list(facts), list(layers), settings
        self._pad = pad_id(tok)
        self._rows = torch.arange(len(facts)).repeat_interleave(settings.samples)
        self._embedded = self._embeddings()
        self.sigma = settings.noise * float(torch.cat(self._embedded).std())
        self.clean, self._clean = self._observe(torch.arange(len(facts)), noisy=False)
        found, self._noisy = self._observe(self._rows, noisy=True)
        self.corrupted = found.reshape(len(facts), settings.samples)

    def layer(self, index: int) -> LayerTrace:
        """Restore the MoE block's output of one layer."""
        moe, clean = self.view.layers[index], self._clean.block[index]

        def restore(rows: Tensor, output: Tensor) -> Tensor:
            return clean[self._rows[rows]].to(output)

        restored = self._probabilities(torch.arange(len(self._rows)), moe.output_site, restore)
        by_fact = restored.reshape(self.corrupted.shape).mean(1)
        noisy = self.corrupted.mean(1)
        columns = (self.clean, noisy, by_fact, by_fact - noisy)
        return LayerTrace(index, *(Mean.of((100 * column).tolist()) for column in columns))

    def experts(self, index: int) -> list[ExpertTrace]:
        """Restore the contribution of one expert at a time, of those that a fact is routed to without noise.

        With noise an expert may not be picked at all; its contribution there is 0. The largest total comes first.
        """
        moe, routing = self.view.layers[index], self._clean.routing[index]
        picked = routing.expert
        effects = torch.zeros(picked.shape, dtype=torch.float64)
        for slot in range(picked.shape[1]):
            with torch.no_grad():
                wanted = picked[:, slot : slot + 1]
                before = contributions(moe, routing, wanted)[:, 0]
                now = contributions(moe, self._noisy.routing[index], wanted[self._rows])[:, 0]
                moved = before[self._rows] - now
            restored = self._probabilities(torch.arange(len(self._rows)), expert_site(moe), _adding(moved))
            effects[:, slot] = restored.reshape(self.corrupted.shape).mean(1) - self.corrupted.mean(1)
        return self._by_expert(index, picked, routing.gate != 0, effects)

    def _by_expert(self, index: int, picked: Tensor, used: Tensor, effects: Tensor) -> list[ExpertTrace]:
        found = []
        for expert in torch.unique(picked[used]).tolist():
            values = (100 * effects[(picked == expert) & used]).tolist()
            total = sum(values) / len(self.facts)
            found.append(ExpertTrace(index, expert, Mean.of(values), len(values), total))
        return sorted(found, key=lambda one: (-one.total, one.expert))

    def _embeddings(self) -> list[Tensor]:
        """Embeddings ``[n, d]`` float32 of each subject's tokens, as the model puts them out."""
        table, device = input_embeddings(self.view.model), model_device(self.view.model)
        found = []
        for fact in self.facts:
            start, end = fact.subject
            with torch.no_grad():
                found.append(table(torch.tensor([fact.ids[start : end + 1]], device=device))[0].float().cpu())
        return found

    def _noise(self, fact: int) -> Tensor:
        """``[samples, n, d]``, the draws of one fact."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        for token in self.facts[fact].ids:  # the same fact gets the same noise, whatever the others are
            generator.manual_seed((generator.initial_seed() * 1_000_003 + token + 1) % (2**63))
        shape = (self.settings.samples, *self._embedded[fact].shape)
        return self.sigma * torch.randn(shape, generator=generator)

    def _observe(self, rows: Tensor, noisy: bool) -> tuple[Tensor, _Seen]:
        """Probabilities of R rows (facts), and what every layer does at their fact tokens."""
        blocks: dict[int, list[Tensor]] = {index: [] for index in self.layers}
        routing: dict[int, list[Routing]] = {index: [] for index in self.layers}

        def watch(flat: Tensor, handles: list[Any]) -> None:
            for index in self.layers:
                moe = self.view.layers[index]
                handles.append(read_routing(moe, _routing_reader(routing[index], flat)))
                handles.append(moe.output_site.register_forward_hook(_output_reader(blocks[index], flat)))

        found = self._run(rows, torch.arange(len(rows)) if noisy else None, watch)
        seen = {index: torch.cat(parts) for index, parts in blocks.items()} if not noisy else {}
        return found, _Seen(seen, {index: _joined(parts) for index, parts in routing.items()})

    def _probabilities(self, rows: Tensor, site: nn.Module, change: Change) -> Tensor:
        """Probabilities of noisy rows while what ``site`` puts out at their fact tokens is changed."""
        done = 0

        def watch(flat: Tensor, handles: list[Any]) -> None:
            nonlocal done
            chunk = rows[done : done + len(flat)]
            done += len(flat)
            handles.append(site.register_forward_hook(_output_writer(flat, lambda output: change(chunk, output))))

        return self._run(self._rows[rows], rows, watch)

    def _run(self, facts: Tensor, noise: Tensor | None, watch: Callable[[Tensor, list[Any]], None]) -> Tensor:
        """Probabilities ``[R]`` float64 of rows (numbers of facts), chunk by chunk, under the hooks of ``watch``."""
        size, out = self.settings.batch_size, []
        for start in range(0, len(facts), size):
            chosen = [self.facts[i] for i in facts[start : start + size].tolist()]
            width = max(len(fact.ids) + len(fact.answer) - 1 for fact in chosen)
            flat = torch.arange(len(chosen)) * width + torch.tensor([fact.fact for fact in chosen])
            with inference_mode_of(self.view.model), hooks() as handles:
                if noise is not None:
                    handles.append(self._noise_hook(facts[start : start + size], noise[start : start + size]))
                watch(flat, handles)
                out.append(self._answers(chosen))
        found = torch.cat(out)
        if not torch.isfinite(found).all():
            raise not_finite("The probability of an answer is NaN or infinite")
        return found

    def _answers(self, chosen: Sequence[TracedFact]) -> Tensor:
        logits, labels = answer_logits(self.view.model, [(fact.ids, fact.answer) for fact in chosen], self._pad)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        counts = (labels != -100).sum(1)
        return (-(losses.double().sum(1) / counts)).exp().cpu()

    def _noise_hook(self, facts: Tensor, rows: Tensor) -> Any:
        draws = {fact: self._noise(fact) for fact in set(facts.tolist())}
        sample = rows % self.settings.samples

        def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            out = output.clone()
            for row, (fact, draw) in enumerate(zip(facts.tolist(), sample.tolist(), strict=True)):
                start, end = self.facts[fact].subject
                out[row, start : end + 1] += draws[fact][draw].to(out)
            return out

        return input_embeddings(self.view.model).register_forward_hook(add)


def contributions(moe: MoELayer, routing: Routing, wanted: Tensor) -> Tensor:
    """What experts ``wanted [R, W]`` add at R tokens: ``g_j (W_j k_j + b_j)``, ``[R, W, d]`` float32.

    It is 0 where a token is not routed to the expert.
    """
    device = moe.experts.read(0).device
    wanted, count = wanted.to(device), wanted.shape[1]
    expert, gate = routing.expert.to(device), routing.gate.to(device).float()
    weight = ((expert[:, :, None] == wanted[:, None, :]) * gate[:, :, None]).sum(1)
    flat = wanted.reshape(-1)
    keys = moe.experts.keys(routing.hidden.to(device).repeat_interleave(count, dim=0), flat).float()
    out = keys.new_zeros(len(flat), moe.experts.layout.d_model)
    for j in torch.unique(flat).tolist():
        rows = torch.nonzero(flat == j).squeeze(1)
        bias = moe.experts.expert_bias(j)
        out[rows] = keys[rows] @ moe.experts.read(j).float().T + (0 if bias is None else bias.detach().float())
    return weight[:, :, None] * out.reshape(*wanted.shape, -1)


def expert_site(moe: MoELayer) -> nn.Module:
    """The module to whose output a change of one expert's contribution can be added.

    That is the experts' own sum. Old ModuleLists have no module that returns it, so there it is the block, with whose
    output their gates are measured.
    """
    return moe.block if isinstance(moe.experts, ModuleListExperts) else moe.experts.module


def _adding(moved: Tensor) -> Change:
    return lambda rows, output: output + moved[rows.to(moved.device)].to(output)


def _at(output: Any, flat: Tensor) -> tuple[Tensor, Tensor]:
    """A module's output as ``[N, d]``, and the rows of the fact tokens on its device.

    Raises:
        LayoutError: it does not hold one row per token of the batch.
    """
    hidden = layer_output(output)
    rows = hidden.reshape(-1, hidden.shape[-1])
    if len(flat) and int(flat.max()) >= len(rows):
        raise LayoutError(
            f"A MoE block returned {len(rows)} rows for a batch with more tokens, so no single token's "
            "output can be restored. Please report the model's class."
        )
    return rows, flat.to(hidden.device)


def _output_reader(parts: list[Tensor], flat: Tensor) -> Callable[..., None]:
    def read(module: nn.Module, args: tuple, output: Any) -> None:
        rows, at = _at(output, flat)
        parts.append(rows[at].detach().float().cpu())

    return read


def _output_writer(flat: Tensor, change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def write(module: nn.Module, args: tuple, output: Any) -> Any:
        rows, at = _at(output, flat)
        changed = rows.clone().index_copy(0, at, change(rows[at]).to(rows))
        return replace_layer_output(output, changed.reshape(layer_output(output).shape))

    return write


def _routing_reader(parts: list[Routing], flat: Tensor) -> Callable[[Routing], None]:
    def read(routing: Routing) -> None:
        at = flat.to(routing.hidden.device)
        parts.append(Routing(*(value[at].detach().cpu() for value in (routing.hidden, routing.expert, routing.gate))))

    return read


def _joined(parts: Sequence[Routing]) -> Routing:
    """Rows of several batches as one; slots that a batch does not use get expert 0 with gate 0."""
    slots = max(part.expert.shape[1] for part in parts)

    def widened(value: Tensor) -> Tensor:
        return nn.functional.pad(value, (0, slots - value.shape[1]))

    return Routing(
        torch.cat([part.hidden for part in parts]),
        torch.cat([widened(part.expert) for part in parts]),
        torch.cat([widened(part.gate) for part in parts]),
    )
