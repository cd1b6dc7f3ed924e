"""The user's turn of a chat: what a tokenizer's own template puts around a question."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import RequestError

WITHOUT_THINKING: dict[str, Any] = {"enable_thinking": False, "thinking": False, "thinking_budget": 0}
"""By what templates of reasoning models leave thinking out; each reads the names that it knows."""

_QUESTION, _ANSWER = "QUESTION7f3a", "ANSWER7f3a"
_OPENING = re.compile(r"[<\[◁]\|?(?!/)[\w:]*(?:think|thought|reason)\w*\|?[>\]▷]", re.I)
_CLOSING = re.compile(r"[<\[◁]\|?/[\w:]*(?:think|thought|reason)\w*\|?[>\]▷]", re.I)


@dataclass(frozen=True)
class Turn:
    """The text before and after a question; the answer begins right behind ``after``."""

    before: str
    after: str


def user_turn(tok: PreTrainedTokenizerBase) -> Turn:
    """What the tokenizer's chat template puts around a single question of the user.

    ``after`` ends where the answer begins, thinking left out in the template's own way: by the switches it knows, or as
    it writes an answer without thoughts into a history (which is also how GPT-OSS gets to its final channel, and
    templates that always open a thought past it).

    Raises:
        RequestError: there is no template, it fails, or it changes what the user says.
    """
    if tok.chat_template is None:
        raise RequestError(
            f"The tokenizer of {tok.name_or_path or type(tok).__name__!r} has no chat template, so it can't be asked "
            "in a chat. Leave chat out, or use the model's instruct version."
        )
    failed = "The chat template does not write the user's text once and as it is; leave chat out."
    for content in (str, _as_parts):
        question = {"role": "user", "content": content(_QUESTION)}
        try:
            asked = _rendered(tok, [question], add_generation_prompt=True)
        except (TemplateError, TypeError) as error:
            failed = f"The chat template fails on a single question: {error}"
            continue
        before, mark, after = asked.partition(_QUESTION)
        if mark and _QUESTION not in after:
            answer = {"role": "assistant", "content": content(_ANSWER)}
            return Turn(before, _start_of_answer(after, _in_history(tok, [question, answer], before)))
    raise RequestError(failed)


def writes_the_date(tok: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes today's date, so that prompts of another day are not the same."""
    return any(name in str(tok.chat_template or "") for name in ("strftime_now", "datetime"))


def _as_parts(text: str) -> list[dict[str, str]]:
    """As templates of multimodal models want what is said."""
    return [{"type": "text", "text": text}]


def _start_of_answer(asked: str, told: str | None) -> str:
    """What stands between question and answer: where an answer is asked for, or where one is told in a history."""
    if told is not None and (told.startswith(asked) or _is_open(asked)):
        return told
    return asked


def _in_history(tok: PreTrainedTokenizerBase, chat: list[dict[str, Any]], before: str) -> str | None:
    """The text between question and answer in a chat that has both; None where the template has its own idea of it."""
    try:
        told = _rendered(tok, chat, add_generation_prompt=False)
    except (TemplateError, TypeError):
        return None
    head, mark, _ = told.partition(_ANSWER)
    start, _, after = head.partition(_QUESTION)
    return after if mark and start == before and not _is_open(after) else None


def _is_open(text: str) -> bool:
    """Whether a thought is begun in a text and not ended."""
    return len(_OPENING.findall(text)) > len(_CLOSING.findall(text))


def _rendered(tok: PreTrainedTokenizerBase, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    text = tok.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, **WITHOUT_THINKING
    )
    return cast(str, text)
