"""Token ids of prompts and targets, and the position of the fact token in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import HyperParamsError, RequestError
from easyedit_moe.facts.chat import Turn, user_turn
from easyedit_moe.facts.joining import bare_prompt, bare_target, separator
from easyedit_moe.facts.subjects import find_subject, nearest_span

Span = tuple[int, int]
FACT_TOKENS = ("subject_last", "subject_first", "last", "subject_first_after_last")


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt without trailing special tokens; ``fact`` indexes into ``ids``.

    ``answer`` are the ids of the target that continues it, where one was given.
    """

    ids: tuple[int, ...]
    fact: int
    answer: tuple[int, ...] = ()


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
    tok: PreTrainedTokenizerBase,
    prompt: str,
    subject: str | None,
    fact_token: str = "subject_last",
    target: str | None = None,
    chat: bool = False,
) -> Prompt:
    """Token ids of ``prompt`` and the position of its fact token, whatever the tokenizer's padding side.

    With a ``target`` the ids are those of `encode_pair`: tokens that reach into the answer are not among them.

    Special tokens that the tokenizer puts before the text stay; those that it appends (end of sequence) are dropped,
    since a target follows, and so are spaces at the end, which tokenizers put into the target's first word. Positions
    follow EasyEdit's names: ``subject_last``, ``subject_first``, ``last`` and ``subject_first_after_last``, the token
    behind the subject (the prompt's last token where the subject ends it).
    ``subject`` may be None for "last". With ``chat`` the prompt is the user's turn in the tokenizer's template
    (`easyedit_moe.facts.chat.user_turn`), its subject is looked for in what the user says, and "last" is the token
    before the answer.

    Raises:
        HyperParamsError: unknown ``fact_token``. RequestError: empty prompt, blank target, a subject that does not
            occur, or ``chat`` without a template.
    """
    if fact_token not in FACT_TOKENS:
        raise HyperParamsError(f"fact_token must be one of {', '.join(FACT_TOKENS)}; found {fact_token!r}.")
    turn = _turn(tok, chat)
    answer: list[int] = []
    if target is None:
        ids, spans = _encode_with_spans(tok, _context(prompt, turn))
    else:
        ids, spans, answer = _encode_joined(tok, prompt, target, None if fact_token == "last" else subject, turn)
    if not ids:
        raise RequestError(f"The prompt {prompt!r} has no tokens.")
    if fact_token == "last":
        return Prompt(tuple(ids), len(ids) - 1, tuple(answer))
    if subject is None:
        raise RequestError(f"fact_token {fact_token!r} needs a subject; the prompt {prompt!r} came without one.")
    inside = _tokens_of(tok, ids, spans, _within(turn, subject_span(prompt, subject)))
    if not inside:
        raise RequestError(f"No token of the prompt {prompt!r} covers its subject {subject!r}.")
    positions = {
        "subject_first": inside[0],
        "subject_last": inside[-1],
        "subject_first_after_last": min(inside[-1] + 1, len(ids) - 1),
    }
    return Prompt(tuple(ids), positions[fact_token], tuple(answer))


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


def encode_pair(
    tok: PreTrainedTokenizerBase, prompt: str, target: str, subject: str | None = None, chat: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the target that continues it: one text, tokenised once and divided at the border.

    The text is `easyedit_moe.facts.joining.join`; special tokens that the tokenizer puts before it are the prompt's. A
    token that reaches over the border is the answer's first. Where that would leave the prompt, or its ``subject``,
    without a token, both are tokenised by themselves. With ``chat`` the prompt is the user's turn in the tokenizer's
    template, and the target follows where the template begins an answer.

    Raises:
        RequestError: a blank target, or ``chat`` without a template.
    """
    ids, _, answer = _encode_joined(tok, prompt, target, subject, _turn(tok, chat))
    return ids, answer


def encode_answer(tok: PreTrainedTokenizerBase, prompt: str, target: str) -> list[int]:
    """Token ids of a target as it continues a prompt; the second part of `encode_pair`.

    Raises:
        RequestError: a blank target.
    """
    return encode_pair(tok, prompt, target)[1]


def encode_context(tok: PreTrainedTokenizerBase, prompt: str, chat: bool = False) -> list[int]:
    """Token ids of a prompt whose answer is not known: as `encode_text`, without spaces at its end.

    With ``chat`` the prompt is the user's turn in the tokenizer's template.

    Raises:
        RequestError: ``chat`` without a template.
    """
    return encode_text(tok, _context(prompt, _turn(tok, chat)))


def cut_context(
    tok: PreTrainedTokenizerBase, ids: Sequence[int], max_length: int | None, chat: bool = False
) -> list[int]:
    """The last ``max_length`` ids of a context, behind what always stays: its beginning of text, a template's head."""
    if max_length is None or len(ids) <= max_length:
        return list(ids)
    turn = _turn(tok, chat)
    head = 1 if ids[0] == tok.bos_token_id else 0
    if turn is not None:
        head = max(head, len(encode_text(tok, turn.before)))
    head = min(head, max_length - 1)
    return [*ids[:head], *ids[len(ids) - max_length + head :]]


def encode_text(tok: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of plain text, trailing special tokens dropped."""
    return _encode_with_spans(tok, text)[0]


def decode(tok: PreTrainedTokenizerBase, ids: Sequence[int], **options: Any) -> str:
    """Text of one sequence of token ids; ``options`` are those of the tokenizer's own ``decode``."""
    return cast(str, tok.decode(list(ids), **options))  # a list of texts only for a list of sequences


def _turn(tok: PreTrainedTokenizerBase, chat: bool) -> Turn | None:
    return user_turn(tok) if chat else None


def _context(prompt: str, turn: Turn | None) -> str:
    """The text after which an answer follows, without spaces at its end: tokenizers put them into the answer."""
    return bare_prompt(prompt if turn is None else turn.before + bare_prompt(prompt) + turn.after)


def _within(turn: Turn | None, place: Span) -> Span:
    """Where a part of a prompt stands in the text with the template around it."""
    shift = 0 if turn is None else len(turn.before)
    return place[0] + shift, place[1] + shift


def _encode_joined(
    tok: PreTrainedTokenizerBase, prompt: str, target: str, subject: str | None, turn: Turn | None = None
) -> tuple[list[int], list[Span], list[int]]:
    """Ids of the prompt with their spans, and of the answer; see `encode_pair`."""
    text, answer = _context(prompt, turn), bare_target(target)
    if not answer:
        raise RequestError(f"The target {target!r} is blank.")
    if turn is None:
        between = separator(prompt, target) + answer
    else:
        between = (turn.before + bare_prompt(prompt) + turn.after)[len(text) :] + answer
    ids, spans = _encode_with_spans(tok, text + between)
    if getattr(tok, "is_fast", False):
        count = next((i for i, (_, end) in enumerate(spans) if end > len(text)), len(ids))
    else:
        alone = _encode_with_spans(tok, text)[0]
        count = next((i for i, (a, b) in enumerate(zip(ids, alone, strict=False)) if a != b), min(len(ids), len(alone)))
    whole = any(start < end for start, end in spans[:count]) and count < len(ids)
    span = find_subject(prompt, subject) if subject and whole else None
    if whole and (span is None or _tokens_of(tok, ids[:count], spans[:count], _within(turn, span))):
        return ids[:count], spans[:count], ids[count:]
    return *_encode_with_spans(tok, text), _continuation(tok, between)


def _continuation(tok: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that continues another one, whatever that is."""
    # A tokenizer may treat the beginning of a text in its own way, so the text is put behind a line break.
    before = tok("\n", add_special_tokens=False)["input_ids"]
    joined = tok("\n" + text, add_special_tokens=False)["input_ids"]
    if joined[: len(before)] == before and len(joined) > len(before):
        return list(joined[len(before) :])
    return list(tok(text, add_special_tokens=False)["input_ids"])


def _tokens_of(tok: PreTrainedTokenizerBase, ids: Sequence[int], spans: Sequence[Span], place: Span) -> list[int]:
    """Indices of the tokens that cover a part of a text."""
    inside = [i for i, (start, end) in enumerate(spans) if start < place[1] and end > place[0]]
    # SentencePiece puts a space of its own before a text, sometimes as a token, and counts it to the first character.
    while inside and not decode(tok, [ids[inside[0]]]).strip():
        inside.pop(0)
    return inside


def _encode_with_spans(tok: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[Span]]:
    if getattr(tok, "is_fast", False):
        out = tok(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        added = next((i for i, (start, end) in enumerate(out["offset_mapping"]) if end > start), 0)
        first = _twice(out["input_ids"], added)
        ids, spans, special = (out[name][first:] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
    else:
        ids = tok(text)["input_ids"]
        ids = ids[_twice(ids, int(ids[:1] == [tok.bos_token_id])) :]
        special = tok.get_special_tokens_mask(ids, already_has_special_tokens=True)
        spans = _spans_by_decoding(tok, text, ids, special)
    count = len(ids)
    while count and special[count - 1] and spans[count - 1][0] == spans[count - 1][1]:
        count -= 1
    return list(ids[:count]), [tuple(s) for s in spans[:count]]


def _twice(ids: Sequence[int], added: int) -> int:
    """How many of the tokens that were put before a text the text begins with itself, as those of chat templates do."""
    return added if added and list(ids[:added]) == list(ids[added : 2 * added]) else 0


def _spans_by_decoding(
    tok: PreTrainedTokenizerBase, text: str, ids: Sequence[int], special: Sequence[int]
) -> list[Span]:
    """Character spans for a tokenizer without offsets: the growth of the decoded prefix, token by token.

    A token that holds some bytes of a character covers that character, as it does with offsets. A special token covers
    its own characters where the text has them, and one for what the vocabulary lacks what lies before the next token.
    """
    spans: list[Span] = []
    whole, skipped, before, lacking = 0, 0, "", -1
    for i, mark in enumerate(special):
        if mark:
            name = decode(tok, [ids[i]])
            length = len(name) if name and text.startswith(name, whole) else 0
            lacking = i if ids[i] == tok.unk_token_id else lacking
            spans.append((whole, whole + length))
            whole, skipped = whole + length, skipped + length
            continue
        decoded = decode(tok, ids[: i + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        complete = min(len(text), max(whole, skipped + len(decoded.rstrip("\ufffd"))))
        piece = decoded[len(before) :].strip()
        if lacking >= 0 and piece:
            # Nothing tells how long the text was that the vocabulary lacks, but where the next token's text begins.
            place = text.find(piece, whole)
            if place >= 0:
                complete, whole = place + len(piece), place
                skipped = complete - len(decoded)
                spans[lacking] = (spans[lacking][0], place)
            lacking = -1
        spans.append((whole, min(len(text), complete + 1) if decoded.endswith("\ufffd") else complete))
        whole, before = complete, decoded
    if lacking >= 0:
        spans[lacking] = (spans[lacking][0], len(text))
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
