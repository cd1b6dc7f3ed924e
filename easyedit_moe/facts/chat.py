"""Questions as a chat model gets them: the prompt as the user's turn in the tokenizer's own template."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import RequestError
from easyedit_moe.facts.tokens import encode_context

WITHOUT_THINKING: dict[str, Any] = {"enable_thinking": False, "thinking": False, "reasoning_effort": "low"}
"""By what templates of reasoning models leave thinking out, or keep it short; each reads the names that it knows."""


def encode_question(tok: PreTrainedTokenizerBase, prompt: str, chat: bool = False) -> list[int]:
    """Token ids after which a model answers: the text, or with ``chat`` the user's turn and the start of the answer.

    A space at the end of a text is left out, since tokenizers put it into the answer's first word. Thinking is left out
    in the template's own way. Special tokens are those of the tokenizer, or of the template, which writes its own.

    Raises:
        RequestError: ``chat`` with a tokenizer that has no template.
    """
    if not chat:
        return encode_context(tok, prompt)
    if tok.chat_template is None:
        raise RequestError(
            f"The tokenizer of {tok.name_or_path or type(tok).__name__!r} has no chat template, so it can't be asked "
            "in a chat. Leave chat out, or use the model's instruct version."
        )
    # The template writes the special tokens that it wants, a beginning of text included.
    text = tok.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, **WITHOUT_THINKING
    )
    return list(tok(text, add_special_tokens=False)["input_ids"])
