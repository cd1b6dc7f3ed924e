"""Files of facts and records as lists of entries with their numbers: JSON, JSON lines, and tables (csv, tsv)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from easyedit_moe.errors import DataError
from easyedit_moe.facts.records.tables import read_table
from easyedit_moe.storage.files import is_file
from easyedit_moe.storage.strict_json import parse_json

TABLES = {".csv": (",", ";", "\t"), ".tsv": ("\t",), ".tab": ("\t",)}
"""Delimiters that a table's suffix allows, the usual one first."""
LINES = (".jsonl", ".ndjson")
NOT_TEXT = (".xlsx", ".xls", ".ods", ".parquet", ".gz", ".zip", ".arrow", ".pkl")


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        items: its entries, each expected to be a dict; for a JSON file whatever it holds.
        numbers: of each entry: its line (the first line of a file is 1), or in a JSON list its index, from 0.
        unreadable: (number, reason) of lines that could not be read at all.
        unit: "line" or "record", what the numbers count.
        header: the columns of a table; empty for other files.
    """

    items: Any
    numbers: tuple[int, ...]
    unreadable: tuple[tuple[int, str], ...] = ()
    unit: str = "record"
    header: tuple[str, ...] = ()


def read_file(path: str | Path) -> Content:
    """Content of a file of facts or records, by its suffix; any suffix that is not known is read as JSON.

    Raises:
        DataError: missing, empty or in another encoding than UTF-8; not JSON, cut off, or a table without a header.
    """
    path = Path(path)
    if path.suffix.lower() in NOT_TEXT:
        raise DataError(f"{path}: {path.suffix} files are not read. Save it as .csv (UTF-8), .tsv, .jsonl or .json.")
    text = read_text(path)
    if path.suffix.lower() in TABLES:
        table = read_table(text, TABLES[path.suffix.lower()], str(path))
        return Content(table.items, table.numbers, table.unreadable, "line", table.header)
    if path.suffix.lower() in LINES:
        return _read_lines(text, str(path))
    items = _parse_json(text, path)
    return Content(items, tuple(range(len(items))) if isinstance(items, list) else ())


def read_json(path: str | Path) -> Any:
    """Content of a JSON file; numbers with a point come as `Decimal`, which keeps how they are written.

    Raises:
        DataError: missing or empty file, another encoding than UTF-8, or not JSON.
    """
    return _parse_json(read_text(path), Path(path))


def read_text(path: str | Path) -> str:
    """A file's text, which must be UTF-8, with or without a byte-order mark.

    Raises:
        DataError: missing or empty file, or another encoding; the message says where, and what to do.
    """
    path = Path(path)
    if not is_file(path):
        raise DataError(f"The data file {path} does not exist.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.") from error
    advice = "Save it as UTF-8 (in Excel: 'CSV UTF-8'; in an editor: 'save with encoding')."
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4000]:
        raise DataError(f"{path} is encoded as UTF-16 or UTF-32, or is no text at all. {advice}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not UTF-8: line {line} holds the byte 0x{data[error.start]:02x}. {advice}"
        ) from error
    if not text.strip():
        raise DataError(f"{path} is empty: it must hold facts, each with prompt, subject and target_new.")
    return text


def _parse_json(text: str, path: Path) -> Any:
    try:
        return parse_json(text, parse_float=Decimal)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}.{_json_advice(text, path, error)}") from error


def _json_advice(text: str, path: Path, error: ValueError) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return ""
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return " The file seems to be cut off: copy it anew."
    if error.msg == "Extra data" and text.lstrip().startswith("{"):
        return " If it holds one fact per line, name it .jsonl."
    if path.suffix.lower() != ".json":
        return " Known suffixes: .json, .jsonl, .csv, .tsv."
    return ""


def _read_lines(text: str, where: str) -> Content:
    """JSON lines; blank ones are left out. Lines end with a newline only: texts may hold other separators."""
    items, numbers, unreadable = [], [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            items.append(parse_json(line, parse_float=Decimal))
            numbers.append(number)
        except ValueError as error:
            unreadable.append((number, f"not valid JSON: {error}"))
    if not items:
        hint = " If it is one JSON list, name it .json." if text.lstrip().startswith("[") else ""
        raise DataError(f"{where}: no line can be read; line {unreadable[0][0]}: {unreadable[0][1]}.{hint}")
    if len(items) == 1 and isinstance(items[0], list):
        raise DataError(f"{where} holds one JSON list, not one fact per line. Name it .json.")
    return Content(items, tuple(numbers), tuple(unreadable), "line")
