"""Logits as a function of the hidden states behind one layer: what lies before them is computed once and reused.

A target vector only moves one position at the output of one layer. Layers up to that one never change, and, since
attention looks back only, neither do the keys and values of the positions before it in the layers above. Three ways
to run a step, the fastest that reproduces the model's own logits is taken:

- ``"suffix"``: layers above, from the fact token on; earlier positions as cached keys and values (softmax attention).
- ``"layers"``: layers above, whole sequences (models with recurrent state above, such as linear attention).
- ``"model"``: every layer, with the shift added in passing (models whose layers talk past one another).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from easyedit_moe.facts.tokens import collate
from easyedit_moe.moe.capture import (
    STUMBLES,
    experts_on_some,
    hooks,
    model_device,
    run,
    skipping_layers,
    stop_after,
)
from easyedit_moe.moe.config import model_config
from easyedit_moe.moe.embeddings import output_embeddings
from easyedit_moe.moe.layer_outputs import LayerOutput
from easyedit_moe.moe.layers import MoELayerView

logger = logging.getLogger(__name__)

MODES = ("suffix", "layers", "model")
_CHECKED_ROWS = 4


@dataclass(frozen=True)
class ShiftedSequence:
    """A token sequence that is shifted at position ``fact`` and scored at the positions ``scored``.

    All scored positions lie at or behind the fact token: what lies before it can't change.
    """

    ids: tuple[int, ...]
    fact: int
    scored: tuple[int, ...]


@dataclass(frozen=True)
class _Rows:
    """What a step runs on, for R sequences; ``past`` columns of prefix come before the ``S`` that are computed.

    Attributes:
        ids: ``[R, S]``.
        mask: ``[R, past + S]``.
        positions: ``[R, S]``, or None where every row starts at position 0.
        fact: ``[R]``, column of the fact token among the S.
        output: of the layer, its hidden states ``[R, S, d]``.
        cache: keys and values of the prefixes in the layers above, or None.
        scored: per row, columns that are scored.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor | None
    fact: Tensor
    output: LayerOutput
    cache: Any
    scored: tuple[tuple[int, ...], ...]

    @cached_property
    def real(self) -> Tensor:
        """``[n]``, the tokens among the R x S that are not padding."""
        return torch.nonzero(self.mask[:, -self.ids.shape[1] :].reshape(-1)).squeeze(1)

    @cached_property
    def read(self) -> Tensor:
        """``[N]``, the tokens among the R x S that are scored."""
        width = self.ids.shape[1]
        return torch.tensor([i * width + c for i, columns in enumerate(self.scored) for c in columns])

    def select(self, rows: Tensor) -> _Rows:
        """Only these of the R sequences."""
        at = rows.to(self.ids.device)
        positions = None if self.positions is None else self.positions[at]
        cache = None if self.cache is None else _select_cache(self.cache, rows)
        scored = tuple(self.scored[i] for i in rows.tolist())
        fact = self.fact[rows.to(self.fact.device)]
        return _Rows(self.ids[at], self.mask[at], positions, fact, self.output.select(rows), cache, scored)


class UpperLayers:
    """Logits of R sequences for shifts at the output of ``layer``; use under no_grad, with frozen parameters.

    Attributes:
        mode: the entry of ``MODES`` in use.
        states: ``[R, d]`` float32, the layer's output at the fact tokens.
    """

    def __init__(self, view: MoELayerView, layer: int, pad: int, sequences: Sequence[ShiftedSequence]) -> None:
        self.view, self.layer = view, layer
        output = self._output(sequences, pad)
        hidden = output.hidden
        facts = torch.tensor([s.fact for s in sequences], device=hidden.device)
        self.states = hidden[torch.arange(len(sequences), device=hidden.device), facts].float()
        few = _diverse(sequences)
        plain = self._plain_logits([sequences[i] for i in few], pad)
        for mode in self._candidates(sequences, output):
            self.mode = mode
            if mode == MODES[-1]:
                self._rows = self._lay_out(sequences, output, pad)
            elif self._works(sequences, output, pad, torch.tensor(few), plain):
                break
        if self.mode != MODES[0]:
            logger.info("Layers above %d: every step runs %s.", layer, _EXPLAINED[self.mode])

    def select(self, rows: Tensor) -> None:
        """Keep only these sequences."""
        self._rows, self.states = self._rows.select(rows), self.states[rows.to(self.states.device)]

    def logits(self, shift: Tensor) -> Tensor:
        """Logits ``[N, V]`` float32 at the scored positions, row by row, with ``shift [R, d]`` at the fact tokens."""
        return self._run(self._rows, shift)

    def _output(self, sequences: Sequence[ShiftedSequence], pad: int) -> LayerOutput:
        caught: list[Any] = []
        module = self.view.decoder_layers[self.layer]
        with hooks() as handles:
            handles.append(module.register_forward_hook(lambda _, __, out: caught.append(out)))
            handles.append(stop_after(module))
            run(self.view.model, collate([s.ids for s in sequences], pad))
        return LayerOutput.of(caught[0])

    def _plain_logits(self, sequences: Sequence[ShiftedSequence], pad: int) -> Tensor:
        batch = collate([s.ids for s in sequences], pad, str(model_device(self.view.model)))
        return self._forward([s.scored for s in sequences], input_ids=batch.ids, attention_mask=batch.mask)

    def _candidates(self, sequences: Sequence[ShiftedSequence], output: LayerOutput) -> tuple[str, ...]:
        if output.has_more and any(isinstance(v, Tensor) and len(v) != len(sequences) for v in output.more or ()):
            return MODES[-1:]  # what comes with the hidden states is not one row per sequence
        worth = max(s.fact for s in sequences) > 0 and _cacheable(self.view.model, self.layer)
        return MODES if worth and not output.has_more else MODES[1:]

    def _works(
        self, sequences: Sequence[ShiftedSequence], output: LayerOutput, pad: int, few: Tensor, plain: Tensor
    ) -> bool:
        """Whether steps in this mode run and reproduce the model's own logits."""
        try:
            self._rows = self._lay_out(sequences, output, pad)
            return self._is_exact(few, plain)
        except STUMBLES as error:  # layers that need what the skipped ones hand on beside the hidden states
            logger.debug("Mode %s does not run: %r", self.mode, error)
            return False

    def _lay_out(self, sequences: Sequence[ShiftedSequence], output: LayerOutput, pad: int) -> _Rows:
        hidden = output.hidden
        device = model_device(self.view.model)
        if self.mode != "suffix":
            batch = collate([s.ids for s in sequences], pad, str(device))
            facts = torch.tensor([s.fact for s in sequences], device=hidden.device)
            return _Rows(batch.ids, batch.mask, None, facts, output, None, tuple(s.scored for s in sequences))
        past = max(s.fact for s in sequences)
        suffix = collate([s.ids[s.fact :] for s in sequences], pad, str(device))
        start = torch.tensor([s.fact for s in sequences], device=device)
        column = torch.arange(past, device=device)[None] - (past - start)[:, None]  # a prefix ends at the last column
        mask = torch.cat([(column >= 0).long(), suffix.mask], dim=1)
        # Columns of padding get the last real position, so that no position exceeds the model's context.
        ahead = torch.arange(suffix.ids.shape[1], device=device)[None].minimum(suffix.lengths[:, None] - 1)
        cache = self._prefix_cache(sequences, output, pad, column)
        source = (start[:, None] + ahead).to(hidden.device)
        kept = hidden.gather(1, source[:, :, None].expand(-1, -1, hidden.shape[-1]))
        scored = tuple(tuple(p - s.fact for p in s.scored) for s in sequences)
        fact = torch.zeros(len(sequences), dtype=torch.long, device=hidden.device)
        suffixes = replace(output, hidden=kept)
        return _Rows(suffix.ids, mask, start[:, None] + ahead, fact, suffixes, cache, scored)

    def _prefix_cache(self, sequences: Sequence[ShiftedSequence], output: LayerOutput, pad: int, column: Tensor) -> Any:
        """Keys and values of the positions before the fact tokens, flush right, in the layers above."""
        hidden = output.hidden
        past, real = column.shape[1], column >= 0
        position = column.clamp_min(0)
        whole = collate([s.ids for s in sequences], pad, str(column.device))
        source = position.to(hidden.device)[:, :, None].expand(-1, -1, hidden.shape[-1])
        cache = DynamicCache(config=model_config(self.view.model))
        with self._skipping(output, hidden.gather(1, source)):
            self._forward(
                [()] * len(sequences),
                input_ids=whole.ids.gather(1, position),
                attention_mask=real.long(),
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
        for index, entry in enumerate(cache.layers):
            if index <= self.layer and isinstance(entry, DynamicLayer):
                # The model asks its first layers how long the prefix is; they are skipped, so their content is unread.
                empty = torch.zeros(len(sequences), 1, past, 1, dtype=hidden.dtype, device=hidden.device)
                entry.update(empty, empty)
            elif isinstance(entry, DynamicLayer):
                # A masked NaN would still spread through 0 * NaN.
                keys, values = _content(entry)
                keep = real[:, None, past - keys.shape[-2] :, None].to(keys.device)
                entry.keys, entry.values = keys.where(keep, 0), values.where(keep, 0)
        return cache

    def _is_exact(self, rows: Tensor, plain: Tensor) -> bool:
        """Whether a step without a shift reproduces the model's own logits."""
        some = self._rows.select(rows)
        hidden = some.output.hidden
        logits = self._run(some, torch.zeros(len(rows), hidden.shape[-1], device=hidden.device))
        tolerance = 1e-4 if hidden.dtype == torch.float32 else 0.02
        return bool((logits - plain).abs().max() <= tolerance * plain.abs().max().clamp_min(1.0))

    def _run(self, rows: _Rows, shift: Tensor) -> Tensor:
        place = torch.arange(len(rows.fact), device=rows.fact.device)

        def moved(hidden: Tensor) -> Tensor:
            at = (place.to(hidden.device), rows.fact.to(hidden.device))
            return hidden.index_put(at, shift.to(hidden), accumulate=True)

        inputs: dict[str, Any] = {"input_ids": rows.ids, "attention_mask": rows.mask}
        if self.mode == "model":

            def add(module: nn.Module, args: tuple, output: Any) -> Any:
                apart = LayerOutput.of(output)
                return apart.put_back(moved(apart.hidden))

            with hooks() as handles:
                handles.append(self.view.decoder_layers[self.layer].register_forward_hook(add))
                return self._forward(rows.scored, **inputs)
        if rows.cache is not None:
            # A step appends to what it is given, so it gets layers of its own around the same tensors.
            cache = copy.copy(rows.cache)
            cache.layers = [copy.copy(entry) for entry in rows.cache.layers]
            inputs |= {"position_ids": rows.positions, "past_key_values": cache, "use_cache": True}
        with self._skipping(rows.output, moved(rows.output.hidden)), hooks() as handles:
            self._skip_unread_tokens(rows, handles)
            return self._forward(rows.scored, **inputs)

    def _skipping(self, output: LayerOutput, hidden: Tensor) -> Any:
        return skipping_layers(self.view, self.layer, replace(output, hidden=hidden))

    def _skip_unread_tokens(self, rows: _Rows, handles: list[Any]) -> None:
        """No expert computes padding, nor, in the last layer, tokens that are not scored."""
        last, real = self.view.num_layers - 1, rows.real
        for index, moe in self.view.routed.items():
            if index > self.layer:
                handles += experts_on_some(moe, rows.ids.numel(), rows.read if index == last else real)

    def _forward(self, scored: Sequence[Sequence[int]], **inputs: Any) -> Tensor:
        """The model's logits at the scored columns only, ``[N, V]`` float32."""
        row = torch.tensor([i for i, columns in enumerate(scored) for _ in columns], dtype=torch.long)
        column = torch.tensor([c for columns in scored for c in columns], dtype=torch.long)

        def pick(module: nn.Module, args: tuple) -> tuple:
            hidden = args[0]
            return (hidden[row.to(hidden.device), column.to(hidden.device)][None], *args[1:])

        with hooks() as handles:
            handles.append(output_embeddings(self.view.model).register_forward_pre_hook(pick))
            output = self.view.model(**{"use_cache": False, **inputs})
        return output.logits[0].float()


_EXPLAINED = {"layers": "whole sequences", "model": "all layers"}


def _cacheable(model: nn.Module, layer: int) -> bool:
    """Whether all that the layers above ``layer`` keep of earlier positions is keys and values."""
    try:
        entries = DynamicCache(config=model_config(model)).layers[layer + 1 :]
    except (AttributeError, KeyError, TypeError, ValueError):
        return False  # a configuration that transformers can't describe a cache for
    attention = (DynamicLayer, DynamicSlidingWindowLayer)
    return any(type(e) in attention for e in entries) and all(
        type(e) in attention or type(e).__name__ == "DummyLayer" for e in entries
    )


def _select_cache(cache: Any, rows: Tensor) -> Any:
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(entry) for entry in cache.layers]
    for entry in chosen.layers:
        if isinstance(entry, DynamicLayer) and entry.is_initialized:
            keys, values = _content(entry)
            at = rows.to(keys.device)
            entry.keys, entry.values = keys[at], values[at]
    return chosen


def _content(entry: DynamicLayer) -> tuple[Tensor, Tensor]:
    """Keys and values of a cache's layer, which are None only before it has seen a token."""
    return cast(tuple[Tensor, Tensor], (entry.keys, entry.values))


def _diverse(sequences: Sequence[ShiftedSequence]) -> list[int]:
    """A few sequences that differ most: shortest and longest before and behind the fact token."""
    numbers = range(len(sequences))

    def before(i: int) -> int:
        return sequences[i].fact

    def behind(i: int) -> int:
        return len(sequences[i].ids) - sequences[i].fact

    extremes = [f(numbers, key=k) for k in (before, behind) for f in (min, max)]
    return sorted(set(extremes))[:_CHECKED_ROWS]
