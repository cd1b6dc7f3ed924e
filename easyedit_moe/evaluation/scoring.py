"""Teacher-forced scores of targets after prompts, batched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.evaluation.context import check_fit
from easyedit_moe.facts.tokens import collate, cut_context, encode_pair, pad_id
from easyedit_moe.moe.capture import hooks, inference_mode_of, model_device
from easyedit_moe.moe.embeddings import output_embeddings
from easyedit_moe.progress import progress_bar


@dataclass(frozen=True)
class TargetScore:
    """One target after one prompt, teacher-forced.

    Attributes:
        nll: mean negative log-likelihood per target token, as in ROME and MEMIT.
        predicted: the most likely token at each target position, given the true tokens before it.
        labels: the target's tokens.
    """

    nll: float
    predicted: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def token_accuracy(self) -> float:
        """Share of target tokens that are the most likely ones."""
        return sum(a == b for a, b in zip(self.predicted, self.labels, strict=True)) / len(self.labels)

    @property
    def exact(self) -> bool:
        """All target tokens are the most likely ones, which is when free greedy generation writes the target."""
        return self.predicted == self.labels


def score_only(model: nn.Module, positions: Tensor) -> Any:
    """Hook handle that hands only ``positions [B, M]`` of each row to the output embedding."""

    def select(module: nn.Module, args: tuple) -> tuple:
        hidden = args[0]
        index = positions.to(hidden.device)[:, :, None].expand(-1, -1, hidden.shape[-1])
        return (hidden.gather(1, index), *args[1:])

    return output_embeddings(model).register_forward_pre_hook(select)


def score_targets(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    batch_size: int = 128,
    max_length: int | None = None,
    progress: bool = False,
    chat: bool = False,
) -> list[TargetScore]:
    """Scores of (prompt, target) pairs, in their order.

    A prompt of more than ``max_length`` tokens is cut from the left (`easyedit_moe.facts.tokens.cut_context`). With
    ``chat`` each prompt is the user's turn in the tokenizer's template, and the target the beginning of the answer.

    Raises:
        RequestError: a blank target, a prompt that does not fit the model's context and is not cut, or ``chat`` without
            a template. Nothing is computed then.
    """
    if max_length is None:
        check_fit(model, tok, pairs, chat)
    rows = []
    for prompt, target in pairs:
        ids, labels = encode_pair(tok, prompt, target, chat=chat)
        rows.append((cut_context(tok, ids, max_length, chat), labels))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    scores: dict[int, TargetScore] = {}
    with inference_mode_of(model), progress_bar(len(order), "scores", "answer", progress) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for i, score in zip(chosen, _score_batch(model, tok, [rows[i] for i in chosen]), strict=True):
                scores[i] = score
            bar.update(len(chosen))
    return [scores[i] for i in range(len(rows))]


def answer_logits(
    model: nn.Module, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int
) -> tuple[Tensor, Tensor]:
    """Logits ``[B, M, V]`` float32 where each row's (prompt ids, answer ids) predicts its answer, teacher-forced, and
    the answers ``[B, M]`` padded with -100.
    """
    batch = collate([[*ids, *labels[:-1]] for ids, labels in rows], pad, str(model_device(model)))
    width = max(len(labels) for _, labels in rows)
    spare = [width - len(labels) for _, labels in rows]
    spans = [range(len(ids) - 1, len(ids) - 1 + len(labels)) for ids, labels in rows]
    positions = torch.tensor([[*span, *[0] * n] for span, n in zip(spans, spare, strict=True)])
    padded = torch.tensor([[*labels, *[-100] * n] for (_, labels), n in zip(rows, spare, strict=True)])
    with hooks() as handles:
        handles.append(score_only(model, positions))
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits.float()
    return logits, padded.to(logits.device)


def _score_batch(
    model: nn.Module, tok: PreTrainedTokenizerBase, rows: Sequence[tuple[list[int], list[int]]]
) -> list[TargetScore]:
    logits, padded = answer_logits(model, rows, pad_id(tok))
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), padded, reduction="none", ignore_index=-100)
    # What is past a target's end counts nothing; all of a batch is read from the device at once.
    nll = (losses.double().sum(1) / (padded != -100).sum(1)).tolist()
    best = logits.argmax(-1).tolist()
    return [
        TargetScore(mean, tuple(chosen[: len(labels)]), tuple(labels))
        for mean, chosen, (_, labels) in zip(nll, best, rows, strict=True)
    ]
