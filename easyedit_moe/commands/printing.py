"""How commands print: tables that fit a terminal and are whole in a file or a pipe, notes, and no colours unasked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from easyedit_moe.commands.reporting import is_quiet

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Column, Table

NARROW = 24
"""Characters to which a column of texts may shrink on a terminal; numbers are never wrapped."""


def output(stderr: bool = False) -> Console:
    """A console on standard output or error; without any style where ``NO_COLOR`` is set."""
    from rich.console import Console

    plain = bool(os.environ.get("NO_COLOR"))
    return Console(stderr=stderr, color_system=None if plain else "auto", highlight=False)


def say(text: str) -> None:
    """A line of results on standard output, as it is."""
    output().print(text, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """A line about what goes on, on standard error; none with ``-q``."""
    if not is_quiet():
        output(stderr=True).print(text, markup=False, soft_wrap=True)


def say_json(value: Any) -> None:
    """A value as strict JSON on standard output, in lines."""
    from easyedit_moe.storage.strict_json import json_text

    say(json_text(value).rstrip())


def show_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of texts, whatever is in them, as a table; nothing without a row."""
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(*header)
    for row in rows:
        table.add_row(*(Text(" ".join(cell.split())) for cell in row))
    show_table(table)


def show_table(table: Table, console: Console | None = None) -> None:
    """Print a table whole: on a terminal in as many parts as its width asks for, each with the first column.

    On a terminal, columns of texts are wrapped first; what still does not fit goes into a table below. In a file or a
    pipe every row is one line, however wide.
    """
    console = console or output()
    terminal = console.is_terminal
    parts = [
        _part(table, columns, terminal) for columns in (_groups(table, console.width) if terminal else [table.columns])
    ]
    if not terminal:
        console.width = max(console.width, *map(_width, parts))
    if table.title:
        console.print(table.title, style="bold", soft_wrap=not terminal)
    for part in parts:
        console.print(part)


def _groups(table: Table, width: int) -> list[list[Column]]:
    """The columns of each part: all where they fit, else as many as do, the first one in every part."""
    first, *others = table.columns
    groups: list[list[Column]] = [[first]]
    for column in others:
        if len(groups[-1]) > 1 and _least_width(table, [*groups[-1], column]) > width:
            groups.append([first])
        groups[-1].append(column)
    return groups


def _part(table: Table, columns: Sequence[Column], wraps: bool) -> Table:
    from rich.table import Table

    part = Table(box=table.box)
    for column in columns:
        part.add_column(column.header, justify=column.justify, no_wrap=not (wraps and _is_text(table, column)),
                        overflow="fold")  # fmt: skip
    for cells in zip(*(column.cells for column in columns), strict=True):
        part.add_row(*cells)
    return part


def _is_text(table: Table, column: Column) -> bool:
    return column.justify == "left" and _width(_part(table, [column], wraps=False)) > NARROW


def _least_width(table: Table, columns: Sequence[Column]) -> int:
    """Characters that a table of some columns needs, when its columns of texts shrink to `NARROW`."""
    natural = _width(_part(table, columns, wraps=False))
    alone = [_width(_part(table, [column], wraps=False)) for column in columns[1:] if _is_text(table, column)]
    return natural - sum(width - NARROW for width in alone)


def _width(table: Table) -> int:
    """Characters of its widest line, unwrapped."""
    from rich.console import Console

    wide = Console(width=100_000)
    return wide.measure(table).maximum
