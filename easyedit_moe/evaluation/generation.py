"""Answers by free generation, greedy or sampled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import RequestError
from easyedit_moe.evaluation.context import check_fit
from easyedit_moe.facts.tokens import decode, encode_context
from easyedit_moe.moe.capture import inference_mode_of, model_device
from easyedit_moe.moe.config import context_length
from easyedit_moe.progress import progress_bar

MAX_NEW_TOKENS = 16
"""Tokens of an answer, unless somebody asks for more."""
BATCH_SIZE = 16


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; the defaults are greedy.

    Attributes:
        temperature: of the softmax; 0 is greedy.
        top_p: share of the probability mass that is drawn from; 1 is all.
        seed: of the draws, which are then the same on the same machine.

    Raises:
        RequestError: on construction, for a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise RequestError(f"temperature must be 0 (greedy) or greater; found {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must lie in (0, 1]; found {self.top_p}.")

    @property
    def settings(self) -> dict[str, Any]:
        """As ``generate`` takes them; what a checkpoint's generation config says of sampling does not count."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
        return {
            "do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0, "min_p": None,
        }  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What a model says after a prompt.

    Attributes:
        text: without special tokens, stripped.
        ids: all generated tokens, up to the one that ended the answer.
        ended: whether the model ended it, rather than the limit of tokens.
    """

    text: str
    ids: tuple[int, ...]
    ended: bool


def check_limit(max_new_tokens: int) -> None:
    """RequestError for a limit of tokens below 1."""
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens must be at least 1; found {max_new_tokens}.")


def generate_answers(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = MAX_NEW_TOKENS,
    chat: bool = False,
    sampling: Sampling | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
) -> list[Answer]:
    """The model's answers to prompts, in their order.

    Only prompts of equal length share a batch, so nothing is padded and each is computed as it would be alone. The
    random state is as before afterwards.

    Args:
        model: any causal language model of transformers.
        tok: its tokenizer.
        prompts: texts, or with ``chat`` the user's turns.
        max_new_tokens: most tokens of an answer, which also ends where the model's context does.
        chat: put each prompt into the tokenizer's chat template.
        sampling: greedy by default.
        batch_size: prompts at a time.
        progress: show a bar.

    Raises:
        RequestError: a limit below 1, a prompt without tokens or one that fills the model's context, or ``chat`` with a
            tokenizer that has no template.
    """
    check_limit(max_new_tokens)
    check_fit(model, tok, [(prompt, "") for prompt in prompts], chat)
    rows = [encode_context(tok, prompt, chat) for prompt in prompts]
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, ids in enumerate(rows):
        if not ids:
            raise RequestError(f"The prompt {prompts[number]!r} has no tokens.")
        by_length[len(ids)].append(number)
    batches = [
        numbers[start : start + batch_size]
        for _, numbers in sorted(by_length.items())
        for start in range(0, len(numbers), batch_size)
    ]
    found: dict[int, Answer] = {}
    sampling = sampling or Sampling()
    devices = [model_device(model)] if model_device(model).type == "cuda" else []
    with (
        inference_mode_of(model),
        torch.random.fork_rng(devices),
        progress_bar(len(rows), "answers", "prompt", progress) as bar,
    ):
        torch.manual_seed(sampling.seed)
        for numbers in batches:
            answers = _generated(model, tok, [rows[number] for number in numbers], max_new_tokens, sampling)
            found.update(zip(numbers, answers, strict=True))
            bar.update(len(numbers))
    return [found[number] for number in range(len(rows))]


def _generated(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
) -> list[Answer]:
    ids = torch.tensor(rows, device=model_device(model))
    limit = context_length(model)
    if limit is not None:
        max_new_tokens = min(max_new_tokens, limit - ids.shape[1] + 1)
    generate: Any = model.generate
    with torch.no_grad():
        out = generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tok.pad_token_id if tok.pad_token_id is not None else tok.eos_token_id,
            **sampling.settings,
        )
    ends = _ends(model, tok)
    return [_answer(tok, row[ids.shape[1] :].tolist(), ends) for row in out]


def _ends(model: nn.Module, tok: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer, as the model's generation config has them, else its tokenizer."""
    config: Any = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    found = tok.eos_token_id if found is None else found
    return set(found) if isinstance(found, (list, tuple)) else {found} - {None}


def _answer(tok: PreTrainedTokenizerBase, ids: list[int], ends: set[int]) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    ids = ids if end is None else ids[: end + 1]
    return Answer(decode(tok, ids, skip_special_tokens=True).strip(), tuple(ids), end is not None)
