"""Answers by free generation, as EasyEdit's ``generate_edit`` asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.facts.easyedit_requests import HostRequest, prompts_of
from easyedit_moe.facts.tokens import decode, encode_text
from easyedit_moe.moe.capture import inference_mode_of, model_device

SYSTEM_PROMPT = "You are a helpful assistant."
MAX_NEW_TOKENS = 512


def generate_answer(model: nn.Module, tok: PreTrainedTokenizerBase, question: str) -> str:
    """The model's answer, in the tokenizer's chat template where it has one; by the model's generation settings."""
    if tok.chat_template is None:
        text = question
    else:
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
        text = cast(str, tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    ids = torch.tensor([encode_text(tok, text)], device=model_device(model))
    generate: Any = model.generate
    with inference_mode_of(model), torch.no_grad():
        generated = generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS)
    return decode(tok, generated[0][ids.shape[1] :].tolist(), skip_special_tokens=True)


class AnswerScorer:
    """Free answers to a request's prompts: ``rewrite_ans``, ``rephrase_ans``, ``locality_ans``, ``portability_ans``."""

    def __init__(self, model: nn.Module, tok: PreTrainedTokenizerBase) -> None:
        self.model, self.tok = model, tok

    def before(self, batch: Sequence[HostRequest]) -> list[Any]:
        """Answers of the unedited model, one dict per request."""
        return [self._answers(request) for request in batch]

    def measured(self, before: Sequence[Any]) -> None:
        """Nothing is kept of the answers before the edits."""

    def after(self, number: int, batch: Sequence[HostRequest]) -> list[Any]:
        """Answers of the edited model."""
        return self.before(batch)

    def entry(self, request: HostRequest, before: Any, after: Any) -> dict[str, Any]:
        """One request's part of the result."""
        return {"pre": before, "post": after}

    def _answers(self, request: HostRequest) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for place, prompt, _ in prompts_of(request.record):
            answer = generate_answer(self.model, self.tok, prompt)
            if place[0] in ("rewrite", "rephrase"):
                found[f"{place[0]}_ans"] = answer
            else:
                found.setdefault(f"{place[0]}_ans", []).append(answer)
        return found
