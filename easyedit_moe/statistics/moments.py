"""Streaming second moments of expert keys and of the MoE block's output, for all critical layers in one pass.

Texts are cut into shards; several processes share the shards of a round, and after each round a layer whose experts
have all been reached often enough is done. What is summed so far can be written down after a round and taken up again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import DataError, not_finite
from easyedit_moe.facts.tokens import collate, encode_text, pad_id
from easyedit_moe.moe.capture import (
    Routing,
    experts_on_some,
    hooks,
    inference_mode_of,
    read_routing,
    run,
    stop_after,
)
from easyedit_moe.moe.layer_outputs import layer_output
from easyedit_moe.moe.layers import MoELayer, MoELayerView
from easyedit_moe.moe.own_keys import are_sorted_by_expert, collecting_keys, own_keys, sorted_keys
from easyedit_moe.progress import progress_bar
from easyedit_moe.statistics.distributed import rank_and_size, sum_over_processes

SHARD_CHARACTERS = 32768
"""Size of a shard; about 8000 tokens of English."""
ROUND_SHARDS = 8
"""Shards between two looks at the coverage. Up to as many processes find the same as one."""
BATCH_TOKENS = 8192
"""Tokens in one forward, padding included."""

POOLED = 2**23
"""Numbers of the moments that are pooled at once (64 MB in float64)."""

Text = str | Sequence[int]
"""A text, or its token ids."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerMoments:
    """Statistics of one layer over T tokens.

    Attributes:
        keys: ``[E, h, h]``, ``C_j = (1/n_j) sum k k^T`` over the tokens routed to expert j; zero where n_j is.
        counts: ``[E]`` int64, n_j.
        output: ``[d, d]``, mean of ``y y^T`` of the MoE block's output.
        num_tokens: T, padding excluded.
    """

    keys: Tensor
    counts: Tensor
    output: Tensor
    num_tokens: int

    def pooled(self) -> Tensor:
        """``[h, h]`` float64, second moment of all keys of the layer whatever their expert (for whitening)."""
        weights = self.counts.to(torch.float64) / self.counts.sum().clamp_min(1)
        # A few rows of all experts at a time: a copy of the whole in float64 would be twice as large as the moments.
        step = max(1, POOLED // self.keys[:, 0].numel())
        parts = self.keys.split(step, dim=1)
        return torch.cat([torch.einsum("e,eij->ij", weights, part.to(torch.float64)) for part in parts])

    def coverage(self) -> Coverage:
        """How many tokens reached each expert, against the h that a full-rank moment needs."""
        h = self.keys.shape[-1]
        thin = [j for j, n in enumerate(self.counts.tolist()) if n < h]
        return Coverage(int(self.counts.min()), float(self.counts.float().median()), thin, h)


@dataclass(frozen=True)
class Coverage:
    """``thin`` lists the experts that fewer than ``d_hidden`` tokens reached: their moment is rank deficient."""

    minimum: int
    median: float
    thin: list[int]
    d_hidden: int


class Sums:
    """Sums of one layer so far: ``keys [E, h, h]``, ``counts [E]``, ``output [d, d]`` and the number of ``tokens``."""

    def __init__(self, moe: MoELayer, dtype: torch.dtype) -> None:
        layout = moe.experts.layout
        device = next(iter(moe.experts.parameters()))[1].device
        self.moe = moe
        self.keys = torch.zeros(layout.num_experts, layout.d_hidden, layout.d_hidden, dtype=dtype, device=device)
        self.counts = torch.zeros(layout.num_experts, dtype=torch.int64, device=device)
        self.output = torch.zeros(layout.d_model, layout.d_model, dtype=dtype, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64)
        self._trust: bool | None = None
        self._rows: list[Tensor] = []
        self._routing: Routing | None = None
        self._sum: Any = None

    def tensors(self) -> dict[str, Tensor]:
        """All that a later run needs to go on."""
        return {"keys": self.keys, "counts": self.counts, "output": self.output, "tokens": self.tokens}

    def covered(self, counts: Tensor, target: float) -> bool:
        """Whether every expert was reached by ``target * h`` tokens."""
        return int(counts.min()) >= target * self.keys.shape[-1]

    @contextmanager
    def reading(self, real: Tensor) -> Iterator[None]:
        """Inside, one forward of a batch is added; ``real`` are its tokens that are not padding."""
        self._rows.clear()
        with hooks() as handles, ExitStack() as stack:
            if self._trust is not False:
                stack.enter_context(collecting_keys(self.moe, self._rows))
            handles.append(read_routing(self.moe, self._remember))
            handles.append(self.moe.sum_site.register_forward_hook(self._remember_sum))
            handles.append(self.moe.output_site.register_forward_hook(lambda _, __, out: self._add(out, real)))
            yield

    def _remember(self, routing: Routing) -> None:
        self._routing = routing

    def _remember_sum(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._sum = output

    def _add(self, output: Any, real: Tensor) -> None:
        hidden, total = layer_output(output), self._sum
        self._sum = None  # it would stay in memory until the next batch
        if hidden.shape[-1] != len(self.output):  # the experts work in a latent space, and the block leaves it again
            hidden = self.moe.experts.sum_of(total)
        del total
        hidden = hidden.reshape(-1, hidden.shape[-1])
        real = real.to(hidden.device)
        y = hidden if len(real) == len(hidden) else hidden[real]
        add_grams(self.output[None], y, [len(y)])
        keys, counts = self._keys(real)
        add_grams(self.keys, keys, counts.tolist())
        self.counts += counts
        self.tokens += len(real)
        self._rows.clear()

    def _keys(self, real: Tensor) -> tuple[Tensor, Tensor]:
        routing, self._routing = cast(Routing, self._routing), None  # the experts were called before the block was done
        if len(routing.hidden) != len(real):  # the experts saw padding, too
            self._rows.clear()
            routing = Routing(routing.hidden[real], routing.expert[real], routing.gate[real])
        found = own_keys(self.moe, routing, self._rows)
        if found is not None and self._trust is None:
            self._trust = are_sorted_by_expert(self.moe, routing, *found)
        return found if found is not None and self._trust else sorted_keys(self.moe, routing)

    def finish(self) -> LayerMoments:
        """Means over all processes' sums."""
        total = {name: sum_over_processes(value) for name, value in self.tensors().items()}
        if not (torch.isfinite(total["keys"]).all() and torch.isfinite(total["output"]).all()):
            raise not_finite(f"{self.moe.name}: keys or outputs are NaN or infinite")
        keys = total["keys"] / total["counts"].clamp_min(1)[:, None, None]
        tokens = int(total["tokens"])
        return LayerMoments(keys, total["counts"], total["output"] / max(tokens, 1), tokens)


def add_grams(sums: Tensor, rows: Tensor, counts: Sequence[int]) -> None:
    """``sums[j] += X_j^T X_j`` in place, where ``X_j`` are the next ``counts[j]`` rows of ``rows [S, h]``.

    Products of float16 or bfloat16 values are exact in TF32, so a GPU may use its tensor cores for them; the sums stay
    in the dtype of ``sums``. Many small groups are padded to one batched product on a GPU, where a loop would wait for
    its launches; on a CPU the loop is faster (measured: 14 against 21 ms for 16 groups of 1000 x 144).
    """
    exact = rows.dtype in (torch.float16, torch.bfloat16) and sums.dtype == torch.float32
    rows = rows.to(sums.dtype)
    with _tensor_cores(exact and rows.is_cuda):
        if rows.is_cuda and len(counts) * max(counts) <= 2 * len(rows):
            padded = pad_groups(rows, counts)
            sums.baddbmm_(padded.transpose(1, 2), padded)
            return
        start = 0
        for j, count in enumerate(counts):
            if count:
                group = rows[start : start + count]
                sums[j].addmm_(group.T, group)
            start += count


def pad_groups(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """``[E, max(counts), h]``: consecutive groups of ``rows [S, h]``, each filled up with zeros."""
    sizes = torch.tensor(counts, device=rows.device)
    group = torch.repeat_interleave(torch.arange(len(counts), device=rows.device), sizes)
    place = torch.arange(len(rows), device=rows.device) - (sizes.cumsum(0) - sizes)[group]
    padded = rows.new_zeros(len(counts), max(counts), rows.shape[1])
    padded[group, place] = rows
    return padded


@contextmanager
def _tensor_cores(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    saved = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = saved


class Shards(Protocol):
    """A corpus in parts that are made when their turn comes, each on the process that reads it."""

    @property
    def per_round(self) -> int:
        """Parts between two looks at the coverage."""

    def __len__(self) -> int:
        """How many parts there are at most."""

    def part(self, number: int) -> Sequence[Text]:
        """The texts of one part, always the same."""

    def ahead(self, numbers: Sequence[int]) -> AbstractContextManager[None]:
        """Inside, parts are asked for in this order, of which the last ones may never be; some may be made before."""


class Progress(Protocol):
    """Where sums are kept between rounds; see `easyedit_moe.statistics.checkpoint.MomentsCheckpoint`."""

    def resume(self, sums: dict[int, Sums]) -> tuple[int, list[int]]:
        """Fill ``sums`` from what was kept; the next round, and the layers that are done."""

    def keep(self, sums: dict[int, Sums], round_number: int, done: Sequence[int]) -> None:
        """Keep the sums before ``round_number``."""


def collect_moments(
    view: MoELayerView,
    tok: PreTrainedTokenizerBase,
    texts: Sequence[Text] | Shards,
    layers: Sequence[int],
    max_length: int = 512,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 256,
    progress: bool = True,
    coverage_target: float | None = None,
    checkpoint: Progress | None = None,
) -> dict[int, LayerMoments]:
    """Second moments at ``layers`` over every token of ``texts``, each cut at ``max_length`` tokens.

    Padding never counts, and no expert computes it. The forward stops after the last layer that still needs tokens.
    Sums run in ``dtype`` (float32 or float64) on the device of each layer. Where torch.distributed was initialised, the
    processes share the texts and all return the same. The coverage is logged and shown at the bar after each round.

    Args:
        view: of the model.
        tok: its tokenizer.
        texts: the corpus, or parts of it that are made when their turn comes.
        layers: MoE layers, increasing.
        max_length: tokens at which a text is cut.
        dtype: of the sums.
        batch_size: texts in one forward, of at most ``BATCH_TOKENS`` tokens.
        progress: show a progress bar.
        coverage_target: a layer is done once each of its experts was reached by this many times ``h`` tokens; None
            takes all texts.
        checkpoint: keeps the sums after rounds, so that an interrupted run can be taken up.

    Raises:
        LayerError: layers that can't be edited. DataError: no text with a token. NumericalError: keys or outputs that
            are not finite. CacheError: a checkpoint that can't be read.
    """
    sums = {moe.index: Sums(moe, dtype) for moe in view.require(layers)}
    shards = ListedShards(shards_of(texts, max_length)) if isinstance(texts, Sequence) else texts
    first, done = checkpoint.resume(sums) if checkpoint else (0, [])
    rank, size = rank_and_size()
    rounds, read = _rounds(shards, rank, size, first)
    bar = progress_bar(len(shards), "statistics", "shard", progress, initial=read)
    with inference_mode_of(view.model), bar, shards.ahead(list(chain(*rounds))):
        for number, parts in enumerate(rounds, first + 1):
            active = {layer: one for layer, one in sums.items() if layer not in done}
            if not active:
                break
            for part in parts:
                for batch in _batches(tok, shards.part(part), max_length, batch_size):
                    _add_batch(view, batch, pad_id(tok), active)
                bar.update(size)
            totals = {layer: sum_over_processes(one.counts) for layer, one in active.items()}
            bar.set_postfix_str(_told(totals, active, coverage_target))
            if coverage_target is not None:
                done = done + [n for n, one in active.items() if one.covered(totals[n], coverage_target)]
            if checkpoint:
                checkpoint.keep(sums, number, done)
    found = {layer: one.finish() for layer, one in sums.items()}
    if not all(value.num_tokens for value in found.values()):
        raise DataError("None of the corpus's texts has a token to collect statistics from.")
    return found


def _rounds(shards: Shards, rank: int, size: int, first: int) -> tuple[list[range], int]:
    """Of each round from the first on, the numbers of the parts that one process reads; how many parts come before."""
    per_round = max(shards.per_round, size)
    starts = range(first * per_round, len(shards), per_round)
    return [range(len(shards))[start : start + per_round][rank::size] for start in starts], first * per_round


def _told(totals: dict[int, Tensor], active: dict[int, Sums], coverage_target: float | None) -> str:
    """Log how often each layer's experts were reached so far; the line of the layer that is behind the others."""
    lines = {}
    for layer, counts in totals.items():
        least = int(counts.min())
        wanted = "" if coverage_target is None else f" of {coverage_target * active[layer].keys.shape[-1]:,.0f} wanted"
        line = f"layer {layer}: least {least:,}{wanted} (expert {int(counts.argmin())}), "
        line += f"median {float(counts.double().quantile(0.5)):,.0f}, {int((counts == 0).sum())} unseen"
        lines[least, layer] = line
        logger.info("Tokens per expert so far, %s.", line)
    return lines[min(lines)]


@dataclass(frozen=True)
class ListedShards:
    """`Shards` of texts that are all there."""

    parts: Sequence[Sequence[Text]]

    @property
    def per_round(self) -> int:
        """As for every corpus of texts."""
        return ROUND_SHARDS

    def __len__(self) -> int:
        """How many."""
        return len(self.parts)

    def part(self, number: int) -> Sequence[Text]:
        """One of them."""
        return self.parts[number]

    def ahead(self, numbers: Sequence[int]) -> AbstractContextManager[None]:
        """There is nothing to make."""
        return nullcontext()


def shards_of(texts: Sequence[Text], max_length: int) -> list[list[Text]]:
    """Consecutive texts of about ``SHARD_CHARACTERS`` characters that count."""
    shards: list[list[Text]] = []
    room = 0
    for text in texts:
        if room <= 0:
            shards.append([])
            room = SHARD_CHARACTERS
        shards[-1].append(text)
        room -= min(len(text), 4 * max_length)
    return shards


def _batches(
    tok: PreTrainedTokenizerBase, texts: Sequence[Text], max_length: int, batch_size: int
) -> Iterator[list[list[int]]]:
    """Token ids by length, at most ``batch_size`` texts and ``BATCH_TOKENS`` tokens (but at least one text) at once."""
    encoded = sorted((ids for ids in (encode_cut(tok, text, max_length) for text in texts) if ids), key=len)
    batch: list[list[int]] = []
    for ids in encoded:
        if batch and (len(batch) == batch_size or (len(batch) + 1) * len(ids) > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch


def encode_cut(tok: PreTrainedTokenizerBase, text: Text, max_length: int) -> list[int]:
    """The first ``max_length`` tokens; of a long text only its beginning is tokenised where that surely suffices."""
    if not isinstance(text, str):
        return list(text[:max_length])
    if len(text) > 16 * max_length:
        ids = encode_text(tok, text[: 16 * max_length])
        if len(ids) > max_length + 64:  # how a cut changes tokens is forgotten by then
            return ids[:max_length]
    return encode_text(tok, text)[:max_length]


def _add_batch(view: MoELayerView, sequences: list[list[int]], pad: int, active: dict[int, Sums]) -> None:
    batch = collate(sequences, pad)
    real = torch.nonzero(batch.mask.reshape(-1)).squeeze(1)
    last = max(active)
    with hooks() as handles, ExitStack() as stack:
        for index, moe in view.routed.items():
            if index <= last:
                handles += experts_on_some(moe, batch.ids.numel(), real)
        for one in active.values():
            stack.enter_context(one.reading(real))
        handles.append(stop_after(view.decoder_layers[last]))
        run(view.model, batch)
