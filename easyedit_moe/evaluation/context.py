"""Prompts that are longer than a model's context are refused by their length, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import RequestError, shown
from easyedit_moe.facts.chat import user_turn
from easyedit_moe.facts.tokens import encode_context, encode_pair
from easyedit_moe.moe.config import context_length

_LETTERS = 16
"""Characters of a prompt, per token of the context, that are looked at first."""
_MARGIN = 8
"""Tokens by which a text may be counted wrongly that is tokenised in parts."""


def check_fit(
    model: nn.Module, tok: PreTrainedTokenizerBase, pairs: Iterable[tuple[str, str]], chat: bool = False
) -> None:
    """Refuse prompts that do not fit the model's context together with their answers; nothing if none is known.

    Args:
        model: whose config says how long a context it takes.
        tok: its tokenizer.
        pairs: prompts and the answers that follow them; an empty answer leaves room for one token.
        chat: prompts are the user's turn in the tokenizer's template.

    Raises:
        RequestError: one that is too long; the message has its beginning and its number of tokens. Also ``chat``
            without a template.
    """
    limit = context_length(model)
    if limit is None:
        return
    turn = user_turn(tok) if chat else None
    around = _MARGIN + (0 if turn is None else _count(tok, turn.before + turn.after))
    for prompt, answer in dict.fromkeys(pairs):
        # Of a very long text the beginning is enough to see it.
        begun = _count(tok, prompt[: _LETTERS * limit])
        count = begun if len(prompt) <= _LETTERS * limit or begun > limit + _MARGIN else _count(tok, prompt)
        if count > limit + _MARGIN:
            raise _too_long(prompt, f"{count} or more", limit)
        after = _count(tok, answer) if answer else 1
        if count + after + around > limit:
            exact = _exact(tok, prompt, answer, chat)
            if exact > limit:
                raise _too_long(prompt, str(exact), limit)


def _exact(tok: PreTrainedTokenizerBase, prompt: str, answer: str, chat: bool) -> int:
    """Tokens of a prompt and all of its answer but the last, which nothing follows."""
    if not answer:
        return len(encode_context(tok, prompt, chat))
    ids, labels = encode_pair(tok, prompt, answer, chat=chat)
    return len(ids) + len(labels) - 1


def _count(tok: PreTrainedTokenizerBase, text: str) -> int:
    return len(tok(text, verbose=False)["input_ids"])


def _too_long(prompt: str, count: str, limit: int) -> RequestError:
    return RequestError(
        f"{shown(prompt)} has {count} tokens with its answer; the model's context has {limit}. Shorten it, or leave it "
        "out."
    )
