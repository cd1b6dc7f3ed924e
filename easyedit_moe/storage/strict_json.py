"""JSON that every reader takes: numbers that are not finite become null."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from easyedit_moe.errors import DataError
from easyedit_moe.storage.files import replacing


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
    """Write strict JSON in UTF-8, in full or not at all; the path."""
    path, text = Path(path), json_text(value, indent)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


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
    try:
        return parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as cause:
        raise error(f"{path} can't be read as JSON: {cause}") from cause
