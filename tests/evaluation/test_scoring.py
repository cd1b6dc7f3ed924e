"""Scores of a batch are those of each pair alone, and are read from the device at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import requests, tiny_model, tiny_tokenizer
from torch import nn

from benchmarks.syncs import counted_syncs
from easyedit_moe.evaluation import scoring
from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.facts.tokens import encode_pair

TOK = tiny_tokenizer()
PAIRS = [
    (fact["prompt"], target)
    for fact in requests(6)
    for target in ("Paris", "Manila and Rome", fact["target_new"], "the capital of Russia")
]


def plain(model: nn.Module, prompt: str, target: str) -> tuple[float, tuple[int, ...]]:
    ids, labels = encode_pair(TOK, prompt, target)
    with torch.inference_mode():
        logits = model(torch.tensor([[*ids, *labels]])).logits[0, len(ids) - 1 : -1].double()
    nll = -logits.log_softmax(-1)[torch.arange(len(labels)), torch.tensor(labels)].mean()
    return float(nll), tuple(logits.argmax(-1).tolist())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_scores_are_those_of_each_pair_alone(family: str, batch_size: int) -> None:
    model = tiny_model(family)
    for (prompt, target), score in zip(PAIRS, score_targets(model, TOK, PAIRS, batch_size), strict=True):
        nll, predicted = plain(model, prompt, target)
        assert math.isclose(score.nll, nll, rel_tol=1e-5)
        assert score.predicted == predicted


def test_waits_do_not_grow_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two reads of a batch, whatever a model's own forward reads."""

    def logits(model: nn.Module, rows: Sequence[Any], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
        padded = torch.full((len(rows), 9), -100)
        for i, (_, labels) in enumerate(rows):
            padded[i, : len(labels)] = torch.tensor(labels)
        return torch.randn(len(rows), 9, len(TOK)), padded

    monkeypatch.setattr(scoring, "answer_logits", logits)
    for pairs in (PAIRS[:4], PAIRS):
        with counted_syncs("cpu") as found:
            assert len(score_targets(tiny_model(), TOK, pairs, batch_size=64)) == len(pairs)
        assert sum(count for place, count in found.items() if place.startswith("evaluation/scoring.py")) == 2
