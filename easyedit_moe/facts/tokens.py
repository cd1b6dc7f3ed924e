"""Token ids of prompts and targets, and the position of the fact token in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import HyperParamsError, RequestError
from easyedit_moe.facts.joining import bare_prompt, bare_target, separator
from easyedit_moe.facts.subjects import find_subject, nearest_span

FACT_TOKENS = ("subject_last", "subject_first", "last", "subject_first_after_last")


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt without trailing special tokens; ``fact`` indexes into ``ids``."""

    ids: tuple[int, ...]
    fact: int


@dataclass(frozen=True)
class Batch:
    """Right-padded ids, attention mask and lengths: ``[B, S]``, ``[B, S]``, ``[B]``."""

    ids: Tensor
    mask: Tensor
    lengths: Tensor


def subject_span(prompt: str, subject: str) -> tuple[int, int]:
    """Character span of the subject: its first occurrence as whole words (see `find_subject`).

    Raises:
        RequestError: the subject is empty or does not occur; the nearest words of the prompt are named.
    """
    if not subject.strip():
        raise RequestError(f"The subject of {prompt!r} is empty.")
    found = find_subject(prompt, subject)
    if found is None:
        near = nearest_span(prompt, subject)
        hint = f" The nearest words there are {near!r}." if near else ""
        raise RequestError(f"The subject {subject!r} does not occur in the prompt {prompt!r} as whole words.{hint}")
    return found


def encode_prompt(
    tok: PreTrainedTokenizerBase, prompt: str, subject: str | None, fact_token: str = "subject_last"
) -> Prompt:
    """Token ids of ``prompt`` and the position of its fact token, whatever the tokenizer's padding side.

    Special tokens that the tokenizer puts before the text stay; those that it appends (end of sequence) are dropped,
    since a target follows, and so are spaces at the end, which tokenizers put into the target's first word. Positions
    follow EasyEdit's names: ``subject_last``, ``subject_first``, ``last`` and ``subject_first_after_last``, the token
    behind the subject (the prompt's last token where the subject ends it).
    ``subject`` may be None for "last".

    Raises:
        HyperParamsError: unknown ``fact_token``. RequestError: empty prompt, or a subject that does not occur.
    """
    if fact_token not in FACT_TOKENS:
        raise HyperParamsError(f"fact_token must be one of {', '.join(FACT_TOKENS)}; found {fact_token!r}.")
    ids, spans = _encode_with_spans(tok, bare_prompt(prompt))
    if not ids:
        raise RequestError(f"The prompt {prompt!r} has no tokens.")
    if fact_token == "last":
        return Prompt(tuple(ids), len(ids) - 1)
    if subject is None:
        raise RequestError(f"fact_token {fact_token!r} needs a subject; the prompt {prompt!r} came without one.")
    start, end = subject_span(prompt, subject)
    inside = [i for i, (a, b) in enumerate(spans) if a < end and b > start]
    # SentencePiece puts a space of its own before a text, sometimes as a token, and counts it to the first character.
    while inside and not decode(tok, [ids[inside[0]]]).strip():
        inside.pop(0)
    if not inside:
        raise RequestError(f"No token of the prompt {prompt!r} covers its subject {subject!r}.")
    positions = {
        "subject_first": inside[0],
        "subject_last": inside[-1],
        "subject_first_after_last": min(inside[-1] + 1, len(ids) - 1),
    }
    return Prompt(tuple(ids), positions[fact_token])


def encode_target(tok: PreTrainedTokenizerBase, target: str) -> list[int]:
    """Token ids of a target with exactly one space before it, as it continues a prompt, and without special tokens.

    Raises:
        RequestError: a blank target.
    """
    text = target.strip()
    if not text:
        raise RequestError(f"The target {target!r} is blank.")
    # SentencePiece tokenizers put a space of their own before a text, so " x" alone would come out with two.
    before = tok("a", add_special_tokens=False)["input_ids"]
    joined = tok("a " + text, add_special_tokens=False)["input_ids"]
    if joined[: len(before)] == before:
        return list(joined[len(before) :])
    return list(tok(" " + text, add_special_tokens=False)["input_ids"])


def encode_answer(tok: PreTrainedTokenizerBase, prompt: str, target: str) -> list[int]:
    """Token ids of a target as it continues a prompt, after the ids of `encode_context`; without special tokens.

    Between both stands what `easyedit_moe.facts.joining.separator` says, whatever space either text brought along.

    Raises:
        RequestError: a blank target.
    """
    text = bare_target(target)
    if not text:
        raise RequestError(f"The target {target!r} is blank.")
    between = separator(prompt, text)
    if between == " ":
        return encode_target(tok, text)
    text = between + text
    # What stands before decides how a tokenizer begins; where it merges both texts, an anchor is put before instead.
    for start in (bare_prompt(prompt), "\n"):
        before = tok(start, add_special_tokens=False)["input_ids"]
        joined = tok(start + text, add_special_tokens=False)["input_ids"]
        if joined[: len(before)] == before and len(joined) > len(before):
            return list(joined[len(before) :])
    return list(tok(text, add_special_tokens=False)["input_ids"])


def encode_context(tok: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt that an answer follows: as `encode_text`, without spaces at its end."""
    return encode_text(tok, bare_prompt(prompt))


def encode_text(tok: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of plain text, trailing special tokens dropped."""
    return _encode_with_spans(tok, text)[0]


def decode(tok: PreTrainedTokenizerBase, ids: Sequence[int], **options: Any) -> str:
    """Text of one sequence of token ids; ``options`` are those of the tokenizer's own ``decode``."""
    return cast(str, tok.decode(list(ids), **options))  # a list of texts only for a list of sequences


def _encode_with_spans(tok: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if getattr(tok, "is_fast", False):
        out = tok(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        ids, spans, special = out["input_ids"], out["offset_mapping"], out["special_tokens_mask"]
    else:
        ids = tok(text)["input_ids"]
        special = tok.get_special_tokens_mask(ids, already_has_special_tokens=True)
        spans = _spans_by_decoding(tok, text, ids, special)
    count = len(ids)
    while count and special[count - 1] and spans[count - 1][0] == spans[count - 1][1]:
        count -= 1
    return list(ids[:count]), [tuple(s) for s in spans[:count]]


def _spans_by_decoding(
    tok: PreTrainedTokenizerBase, text: str, ids: Sequence[int], special: Sequence[int]
) -> list[tuple[int, int]]:
    """Character spans for a tokenizer without offsets: the growth of the decoded prefix, token by token.

    A token that holds some bytes of a character covers that character, as it does with offsets.
    """
    spans, whole = [], 0
    for i, mark in enumerate(special):
        if mark:
            spans.append((whole, whole))
            continue
        decoded = decode(tok, ids[: i + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        complete = min(len(text), max(whole, len(decoded.rstrip("\ufffd"))))
        spans.append((whole, min(len(text), complete + 1) if decoded.endswith("\ufffd") else complete))
        whole = complete
    return spans


def pad_id(tok: PreTrainedTokenizerBase) -> int:
    """An id to pad with; any will do, because padding is masked and right of every real token."""
    for candidate in (tok.pad_token_id, tok.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def collate(sequences: Sequence[Sequence[int]], pad: int, device: str = "cpu") -> Batch:
    """Right-pad token ids into one batch; causal attention then keeps padding out of every real token."""
    lengths = torch.tensor([len(s) for s in sequences])
    ids = torch.full((len(sequences), int(lengths.max())), pad, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    mask = (torch.arange(ids.shape[1])[None, :] < lengths[:, None]).long()
    return Batch(ids.to(device), mask.to(device), lengths.to(device))
