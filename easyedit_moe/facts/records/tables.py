"""Tables of facts (csv, tsv): rows under a header as the dicts that JSON files hold."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from easyedit_moe.errors import DataError, RequestError
from easyedit_moe.facts.records.columns import LISTS, column_of
from easyedit_moe.storage.strict_json import parse_json

SEPARATOR = " | "
"""Stands between several texts of one cell."""
NO_VALUE = ("NaN", "nan", "#N/A")
"""What programs write into cells without a value."""
REQUIRED = ({"prompt", "target_new"}, {"src", "alt"}, {"update", "ans"}, {"text", "concept", "labels"},
            {"question", "subject", "object"}, {"prompt", "ans", "loc"})  # fmt: skip
"""Columns by which a header is known: those of facts, ZsRE, WikiBigEdit, WikiBio, HalluEditBench, UltraEditBench."""


@dataclass(frozen=True)
class Table:
    """The columns' names, rows as dicts, each with the number of its (first) line; and lines that can't be read."""

    header: tuple[str, ...]
    items: list[dict[str, Any]]
    numbers: tuple[int, ...]
    unreadable: tuple[tuple[int, str], ...]


def read_table(text: str, delimiters: Sequence[str], where: str) -> Table:
    """Rows of a table with a header; blank rows are left out.

    Of ``delimiters`` counts the one with which the first line names the columns of facts; a first line ``sep=;``, as
    Excel writes it, is believed. Cells are stripped. Cells of columns that take several texts come as lists.

    Raises:
        DataError: the first line is no header.
    """
    first = text.split("\n", 1)[0].strip(" \r").strip('"')
    skipped = 0
    if first.lower().startswith("sep=") and len(first) == 5:
        delimiters, skipped, text = (first[4],), 1, text.split("\n", 1)[1] if "\n" in text else ""
    header, delimiter = _header(text, delimiters, where)
    items, numbers, unreadable = [], [], []
    for line, row in _rows(text, delimiter):
        if line == 1:
            continue
        number = line + skipped
        try:
            if isinstance(row, str):
                raise RequestError(row)
            item = _item(header, row)
        except RequestError as error:
            unreadable.append((number, str(error)))
            continue
        if item:
            items.append(item)
            numbers.append(number)
    if not items and not unreadable:
        raise DataError(f"{where} holds a header, but no facts under it.")
    return Table(tuple(name for name in header if name), items, tuple(numbers), tuple(unreadable))


def _header(text: str, delimiters: Sequence[str], where: str) -> tuple[list[str], str]:
    for delimiter in delimiters:
        _, row = next(_rows(text, delimiter), (0, ""))
        names = [] if isinstance(row, str) else [cell.strip() for cell in row]
        known = {column_of(name) for name in names} | set(names)
        if any(required <= known for required in REQUIRED):
            _check_header(names, where)
            return names, delimiter
        half = known & {"prompt", "target_new"}
        if half and len(names) > 1:
            (lacking,) = {"prompt", "target_new"} - half
            raise DataError(f"{where} lacks the column {lacking}; found the columns {', '.join(names)}.")
    line = text.split("\n", 1)[0].strip()
    raise DataError(
        f"{where} has no header: its first line must name the columns, at least prompt and target_new, and subject for "
        f"most methods (also ground_truth, rephrase, neighbours, portability), separated by "
        f"{' or '.join(_NAMES.get(d, repr(d)) for d in delimiters)}; found {line[:120]!r}."
    )


_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}


def _check_header(names: Sequence[str], where: str) -> None:
    """A column that takes one text may be named once; those that take several may be repeated."""
    taken: dict[str, str] = {}
    for name in names:
        column = column_of(name)
        if column is None or column in LISTS:
            continue
        if column in taken:
            raise DataError(f"{where}: the columns {taken[column]!r} and {name!r} are both {column}; keep one of them.")
        taken[column] = name


def _rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """Each row with the number of its first line, or what is wrong with it; then it goes on with the next line."""
    lines = io.StringIO(text, newline="").readlines()
    position = 0

    def feed() -> Iterator[str]:
        nonlocal position
        while position < len(lines):
            position += 1
            yield lines[position - 1]

    def reader() -> Iterator[list[str]]:
        return csv.reader(feed(), delimiter=delimiter, strict=True, skipinitialspace=delimiter != "\t")

    rows = reader()
    while position < len(lines):
        start = position
        try:
            row = next(rows)
        except csv.Error as error:
            advice = "Put a text that holds quotes in quotes, and double those inside."
            yield start + 1, f"its quotes can't be read: {error}. {advice}"
            position, rows = start + 1, reader()
            continue
        yield start + 1, row


def _item(header: Sequence[str], row: Sequence[str]) -> dict[str, Any]:
    """A row as a dict of its cells that hold something.

    Raises:
        RequestError: more cells than columns, or a list that can't be read.
    """
    cells = [cell.strip() for cell in row]
    if any(cells[len(header) :]):
        raise RequestError(
            f"{len(cells)} cells under {len(header)} columns. Put a text that holds the separator in quotes."
        )
    item: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=False):
        if not cell or cell in NO_VALUE:
            continue
        several = column_of(name) in LISTS
        value = _list(name, cell) if several else cell
        if several and name in item:
            value = [*_as_list(item[name]), *_as_list(value)]
        item[name or f"column {header.index(name) + 1} without a name"] = value
    return item


def _list(name: str, cell: str) -> Any:
    """Several texts of one cell: JSON, or texts with " | " between them."""
    if cell.startswith(("[", "{")):
        try:
            return parse_json(cell, parse_float=Decimal)
        except ValueError as error:
            if cell.startswith(('["', "[{", '{"', "[[")):
                raise RequestError(f"{name}: looks like JSON, but is not valid: {error}.") from error
    return [part.strip() for part in cell.split(SEPARATOR) if part.strip()]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
