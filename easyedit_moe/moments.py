"""Streaming second moments of expert keys and of the MoE block's output, for all critical layers in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from easyedit_moe.capture import Routing, hooks, inference_mode_of, layer_output, read_routing, run, stop_after
from easyedit_moe.errors import DataError, not_finite
from easyedit_moe.layers import MoELayer, MoELayerView
from easyedit_moe.tokens import Batch, collate, encode_text, pad_id


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
        return torch.einsum("e,eij->ij", weights, self.keys.to(torch.float64))

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


class _Accumulator:
    def __init__(self, moe: MoELayer, dtype: torch.dtype) -> None:
        layout = moe.experts.layout
        device = next(iter(moe.experts.parameters()))[1].device
        self.moe, self.dtype = moe, dtype
        self.keys = torch.zeros(layout.num_experts, layout.d_hidden, layout.d_hidden, dtype=dtype, device=device)
        self.counts = torch.zeros(layout.num_experts, dtype=torch.int64, device=device)
        self.output = torch.zeros(layout.d_model, layout.d_model, dtype=dtype, device=device)
        self.tokens = 0
        self.real: Tensor | None = None

    def add_routing(self, routing: Routing) -> None:
        rows = self._real_rows(routing.hidden.device)
        expert, gate = routing.expert[rows], routing.gate[rows]
        token, slot = torch.nonzero(gate != 0, as_tuple=True)
        chosen = expert[token, slot]
        order = torch.argsort(chosen, stable=True)
        hit, counts = torch.unique_consecutive(chosen[order], return_counts=True)
        hidden = routing.hidden[rows][token[order]]
        start = 0
        for j, count in zip(hit.tolist(), counts.tolist(), strict=True):
            key = self.moe.experts.expert_key(hidden[start : start + count], j).to(self.dtype)
            self.keys[j].addmm_(key.T, key)
            start += count
        self.counts[hit] += counts
        self.tokens += len(rows)

    def add_output(self, module: Any, args: tuple, output: Any) -> None:
        hidden = layer_output(output)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        y = hidden[self._real_rows(hidden.device)].to(self.dtype)
        self.output.addmm_(y.T, y)

    def _real_rows(self, device: torch.device) -> Tensor:
        return self.real.to(device)

    def finish(self) -> LayerMoments:
        if not (torch.isfinite(self.keys).all() and torch.isfinite(self.output).all()):
            raise not_finite(f"{self.moe.name}: keys or outputs are NaN or infinite")
        keys = self.keys / self.counts.clamp_min(1)[:, None, None]
        return LayerMoments(keys, self.counts, self.output / max(self.tokens, 1), self.tokens)


def collect_moments(
    view: MoELayerView,
    tok: PreTrainedTokenizerBase,
    texts: Sequence[str],
    layers: Sequence[int],
    max_length: int = 512,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[int, LayerMoments]:
    """Second moments at ``layers`` over every token of ``texts``, each cut at ``max_length`` tokens.

    Padding never counts. The forward stops after the last layer named. Sums run in ``dtype`` (float32 or float64) on
    the device of each layer.

    Raises:
        LayerError: layers that can't be edited. DataError: no text with a token. NumericalError: keys or outputs that
            are not finite.
    """
    accumulators = {moe.index: _Accumulator(moe, dtype) for moe in view.require(layers)}
    encoded = sorted((encode_text(tok, text)[:max_length] for text in texts), key=len)
    encoded = [ids for ids in encoded if ids]
    if not encoded:
        raise DataError(f"None of the {len(texts)} texts has a token to collect statistics from.")
    starts = range(0, len(encoded), batch_size)
    with inference_mode_of(view.model), hooks() as handles:
        for index, accumulator in accumulators.items():
            moe = view.layers[index]
            handles.append(read_routing(moe, accumulator.add_routing))
            handles.append(moe.output_site.register_forward_hook(accumulator.add_output))
        handles.append(stop_after(view.decoder_layers[max(layers)]))
        for start in tqdm(starts, desc="statistics", disable=not progress, leave=False):
            batch = collate(encoded[start : start + batch_size], pad_id(tok))
            _announce(accumulators.values(), batch)
            run(view.model, batch)
    return {index: accumulator.finish() for index, accumulator in accumulators.items()}


def _announce(accumulators: Any, batch: Batch) -> None:
    real = torch.nonzero(batch.mask.reshape(-1)).squeeze(1)
    for accumulator in accumulators:
        accumulator.real = real
