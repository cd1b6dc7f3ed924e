"""Portability: whether what follows from an edit is known, too."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.evaluation.summary import Score
from easyedit_moe.facts.records import EvaluationRecord


def portability(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    records: Sequence[EvaluationRecord],
    batch_size: int = 128,
    chat: bool = False,
) -> Score:
    """Teacher-forced token accuracy of the answers to portability prompts; of several right answers the best counts.

    A record's value is the mean over its prompts; records without any do not count. With ``chat`` every prompt is the
    user's turn in the tokenizer's template.
    """
    probes = [[probe for group in record.portability for probe in group.probes] for record in records]
    pairs = [(probe.prompt, answer) for listed in probes for probe in listed for answer in probe.answers]
    unique = list(dict.fromkeys(pairs))
    found = score_targets(model, tok, unique, batch_size, chat=chat) if unique else []
    scores = dict(zip(unique, found, strict=True))
    values = [
        sum(max(scores[probe.prompt, answer].token_accuracy for answer in probe.answers) for probe in listed)
        / len(listed)
        if listed
        else None
        for listed in probes
    ]
    return Score.of(values)
