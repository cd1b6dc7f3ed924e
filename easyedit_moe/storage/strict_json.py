"""JSON that every reader takes: numbers that are not finite become null."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from easyedit_moe.errors import DataError
from easyedit_moe.storage.files import check_readable, write_text

_DIGEST = "digest"


def finite(value: Any) -> Any:
    """The same value, with None for each float that is NaN or infinite, and lists for tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def json_text(value: Any, indent: int | None = 1) -> str:
    """Strict JSON in the letters as they are; lists of numbers stay on one line, and a newline ends indented text."""
    text = json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text if indent is None else _NUMBERS.sub(_on_one_line, text) + "\n"


_NUMBER = r"(?:null|-?\d[\d.eE+-]*)"
_NUMBERS = re.compile(rf"\[\n\s*({_NUMBER}(?:,\n\s*{_NUMBER})*)\n\s*\]")  # texts hold no line breaks as such


def _on_one_line(found: re.Match[str]) -> str:
    return f"[{', '.join(part.strip() for part in found[1].split(','))}]"


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> Path:
    """Write strict JSON in UTF-8, in full or not at all; the path.

    Raises:
        WriteError: it can't be written; what was there is as it was.
    """
    return write_text(path, json_text(value, indent))


def write_checked_json(path: str | Path, value: Mapping[str, Any], indent: int | None = 1) -> Path:
    """As `write_json`, with a digest of the content in it, so that a later change is noticed.

    Raises:
        WriteError: it can't be written; what was there is as it was.
    """
    return write_json(path, {**value, _DIGEST: _content_digest(value)}, indent)


def read_checked_json(
    path: str | Path, error: type[Exception] = DataError, advice: str = "make it anew"
) -> dict[str, Any]:
    """The object that a JSON file holds, its digest left out; earlier versions wrote none.

    Raises:
        ``error``: it is missing, unreadable, no JSON object, or not what was written.
    """
    content = read_json(path, error)
    if not isinstance(content, dict):
        raise error(f"{path} holds no JSON object; {advice}.")
    told = content.pop(_DIGEST, None)
    if told is not None and told != _content_digest(content):
        raise error(f"{path} is damaged: it is not what was written; {advice}.")
    return content


def _content_digest(value: Mapping[str, Any]) -> str:
    return digest(json.loads(json_text(value)))[:32]


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def parse_json(text: str | bytes, **options: Any) -> Any:
    """What a text of JSON says; ``options`` are those of `json.loads`.

    Raises:
        ValueError: it is no JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text, **options)
    except RecursionError as cause:
        raise ValueError("it is nested too deeply") from cause


def read_json(path: str | Path, error: type[Exception] = DataError) -> Any:
    """What a JSON file holds, with or without a byte order mark.

    Raises:
        ``error``: it is missing, unreadable, or not JSON.
    """
    check_readable(path, error)
    try:
        return parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{path} can't be read as JSON: {cause}") from cause
