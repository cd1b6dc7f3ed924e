"""What counts as a text of a fact, and when two texts say the same."""

from __future__ import annotations

import unicodedata
from typing import Any

from easyedit_moe.errors import RequestError, shown


def checked_text(name: str, value: Any) -> str:
    """``value``, which is a text with something in it; ``name`` is what messages call it.

    Raises:
        RequestError: it is missing, no string, blank, or can't be encoded (see `check_encodable`).
    """
    if value is None:
        raise RequestError(f"'{name}' is missing or empty.")
    if not isinstance(value, str):
        raise RequestError(f"'{name}' must be a string; found {shown(value)}.")
    if not value.strip():
        raise RequestError(f"'{name}' is empty or blank.")
    check_encodable(name, value)
    return value


def check_encodable(name: str, text: str, error: type[Exception] = RequestError) -> None:
    """Refuse halves of a character (lone surrogates), which no tokenizer and no file takes.

    Raises:
        ``error``: there is one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as cause:
        raise error(
            f"'{name}' holds half a character (U+{ord(text[cause.start]):04X}, a lone surrogate, at {cause.start}), "
            f"which can't be written as UTF-8; found {shown(text)}. Decode the text anew, as what it was written in."
        ) from cause


def same_text(text: str) -> str:
    """What two texts have in common that a reader takes for one: canonical letters (NFC), single spaces, none around.

    Their tokens may differ; facts whose prompts are one to a reader still repeat or contradict each other. Case,
    compatibility forms and signs count.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())
