"""``ask``: what a model answers, before and after patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from easyedit_moe.errors import RequestError
from easyedit_moe.evaluation.generation import MAX_NEW_TOKENS, Answer, Sampling, generate_answers
from easyedit_moe.workflow.session import (
    Loaded,
    Loading,
    SavedPatch,
    applied,
    asked_in_chat,
    check_patches,
    load,
    loading_options,
    read_patches,
)


@dataclass(frozen=True)
class Asked:
    """One prompt; ``after`` is the answer with the patches, None without any."""

    prompt: str
    before: Answer
    after: Answer | None


def ask(
    prompts: Sequence[str],
    model: str | Loaded = "factworld",
    patches: Sequence[str | Path | SavedPatch] = (),
    chat: bool | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampling: Sampling | None = None,
    loading: Loading | None = None,
    progress: bool = True,
) -> list[Asked]:
    """Answers to prompts as the model is, and with patches on it; the model is then bit-equal to before.

    Args:
        prompts: texts to go on from, or with ``chat`` the user's turns.
        model: hub name, folder or "factworld", or a loaded model and its tokenizer. An adapter that lies beside a
            folder's checkpoint belongs to the model.
        patches: files, or patches that are not applied; laid on in this order.
        chat: put each prompt into the tokenizer's chat template; by default where the patches were made so.
        max_new_tokens: most tokens of an answer.
        sampling: greedy by default.
        loading: how a model is loaded; see `loading_options`.
        progress: show progress bars.

    Raises:
        RequestError: no prompt, a blank one, or a setting out of range. PatchError, AdapterError: a patch that can't be
            read or does not fit. DataError: a model that can't be loaded.
    """
    if not prompts:
        raise RequestError("There is nothing to ask: give at least one prompt.")
    blank = next((number for number, prompt in enumerate(prompts) if not prompt.strip()), None)
    if blank is not None:
        raise RequestError(f"Prompt {blank} is blank.")
    read = read_patches(patches)
    options = loading_options(model, read, loading) if isinstance(model, str) else Loading()
    in_chat = asked_in_chat(read, chat)
    net, tok = load(model, options, progress)
    check_patches(net, tok, read)

    def answers() -> list[Answer]:
        return generate_answers(net, tok, prompts, max_new_tokens, in_chat, sampling, progress=progress)

    before: list[Answer] = answers()
    if not read:
        return [Asked(prompt, answer, None) for prompt, answer in zip(prompts, before, strict=True)]
    with applied(net, tok, read):
        after = answers()
    return [Asked(*row) for row in zip(prompts, before, after, strict=True)]
