"""What EasyEdit's scores need, checked before anything is edited."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import HostError, KeywordError

SCORING_SETTINGS = ("evaluation_type", "api_key", "use_chat_template")
"""Settings of EasyEdit's scores, which it reads from the hparams of its own methods."""
JUDGE = "LLM-judge"
EVALUATION_TYPES = (JUDGE, "generate-text")
"""Besides None, which is token accuracy by teacher forcing."""


def scoring_settings(
    tok: PreTrainedTokenizerBase, evaluation_type: str | None, api_key: str | None, use_chat_template: bool
) -> dict[str, Any]:
    """The settings that are not as EasyEdit has them by default, by their names in its hparams.

    Raises:
        KeywordError: an unknown ``evaluation_type``, an ``api_key`` that nothing would use, or a tokenizer without a
            chat template where one is used. HostError: the judge's client is not installed.
    """
    if evaluation_type is not None and evaluation_type not in EVALUATION_TYPES:
        known = ", ".join(map(repr, EVALUATION_TYPES))
        raise KeywordError(f"evaluation_type must be None or one of {known}; found {evaluation_type!r}.")
    if api_key and evaluation_type != JUDGE:
        raise KeywordError(f"api_key has an effect only with evaluation_type={JUDGE!r}; found {evaluation_type!r}.")
    if api_key and importlib.util.find_spec("openai") is None:
        raise HostError("EasyEdit asks its judge through openai, which is not installed: pip install openai")
    given = {"evaluation_type": evaluation_type, "api_key": api_key, "use_chat_template": use_chat_template}
    found = {name: value for name, value in given.items() if value}
    if (evaluation_type or use_chat_template) and not tok.chat_template:
        raise KeywordError(
            f"{next(iter(found))}={next(iter(found.values()))!r} asks in the tokenizer's chat template, and this "
            "tokenizer has none. Set tok.chat_template, or leave it out."
        )
    return found


def check_fluency() -> None:
    """What ``test_generation`` needs to cut texts into words, for their entropy.

    Raises:
        HostError: nltk is not installed, or its data for sentences is not there; what to install is named.
    """
    if importlib.util.find_spec("nltk") is None:
        raise HostError(
            "test_generation=True needs nltk, which is not installed: pip install nltk, then python -m nltk.downloader "
            "punkt_tab"
        )
    words: Any = importlib.import_module("nltk").word_tokenize
    try:
        words("Two words.")
    except LookupError as error:
        data = "punkt_tab" if "punkt_tab" in str(error) else "punkt"
        raise HostError(
            f"test_generation=True needs nltk's data {data!r}, which is not there: python -m nltk.downloader {data}"
        ) from error
