"""Neighbours whose answer a file does not give: they must keep the answer of the model as it was before the edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.facts.records import EvaluationRecord
from easyedit_moe.facts.tokens import decode, encode_context
from easyedit_moe.moe.capture import inference_mode_of, model_device

ANSWER_TOKENS = 8


def answered(
    model: nn.Module, tok: PreTrainedTokenizerBase, records: Sequence[EvaluationRecord], chat: bool = False
) -> tuple[EvaluationRecord, ...]:
    """The records with their ``unanswered`` prompts among the neighbours, with the model's own greedy answer.

    An answer has up to `ANSWER_TOKENS` tokens and ends with its line. A prompt to which the model says nothing stays
    unanswered. ``model`` must be the unedited one. With ``chat`` each prompt is the user's turn in the tokenizer's
    template.
    """
    prompts = dict.fromkeys(prompt for record in records for prompt in record.unanswered)
    with inference_mode_of(model), torch.no_grad():
        answers = {prompt: _first_line(model, tok, prompt, chat) for prompt in prompts}
    return tuple(_with_answers(record, answers) if record.unanswered else record for record in records)


def _with_answers(record: EvaluationRecord, answers: dict[str, str]) -> EvaluationRecord:
    new = tuple((prompt, answers[prompt]) for prompt in record.unanswered if answers[prompt])
    left = tuple(prompt for prompt in record.unanswered if not answers[prompt])
    return replace(record, neighbours=(*record.neighbours, *new), unanswered=left)


def _first_line(model: nn.Module, tok: PreTrainedTokenizerBase, prompt: str, chat: bool) -> str:
    ids = torch.tensor([encode_context(tok, prompt, chat)], device=model_device(model))
    generate: Any = model.generate
    generated = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    text = decode(tok, generated[0][ids.shape[1] :].tolist(), skip_special_tokens=True)
    return (text.strip().splitlines() or [""])[0].strip()
