"""What no option and no argument takes, whatever the command: looked at before a command begins."""

from __future__ import annotations

from typing import Any, cast

import typer
from typer.core import TyperCommand

LARGEST = 2**31 - 1
"""Bound on the size of whole numbers; hyper-parameters have the same."""
MOST = 1e15
"""Bound on the size of other numbers, which are minutes, GB and the like."""


class Command(TyperCommand):
    """A command whose values are looked at by `fault` first."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            typer.BadParameter: one of its values is no good; nothing was done.
        """
        for parameter in self.params:
            given = ctx.params.get(str(parameter.name))
            for value in given if isinstance(given, (list, tuple)) else [given]:
                if reason := fault(value):
                    raise typer.BadParameter(reason, ctx=ctx, param=cast(Any, parameter))
        return super().invoke(ctx)


def fault(value: Any) -> str:
    """What is wrong with a value from the command line; empty where nothing is."""
    if isinstance(value, float) and not abs(value) <= MOST:
        return f"{value} is no number to reckon with; give one of at most {MOST:g}, or leave the option out."
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"a number of {len(str(value))} digits is too large; the largest is {LARGEST}."
    if isinstance(value, str):
        if "\0" in value:
            return "it holds a NUL."
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return f"{ascii(value)[:80]} is not UTF-8."
    return ""
