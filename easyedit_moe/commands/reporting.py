"""How commands end: an error of ours is one red line and exit code 2, never a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from easyedit_moe.errors import EditingError


@contextmanager
def errors_reported() -> Iterator[None]:
    """Within, an `EditingError` is printed on standard error, and the command exits with code 2."""
    try:
        yield
    except EditingError as error:
        from rich.console import Console
        from rich.markup import escape

        message = escape(f"{type(error).__name__}: {error}")
        Console(stderr=True).print(f"[bold red]error:[/] {message}", highlight=False)
        raise typer.Exit(2) from error
