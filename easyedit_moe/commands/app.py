"""The command ``easyedit-moe``: its subcommands, put together. Heavy packages are imported when a command runs."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from easyedit_moe.commands.compare import compare
from easyedit_moe.commands.evaluate import evaluate
from easyedit_moe.commands.methods import methods
from easyedit_moe.commands.plan import plan

app = typer.Typer(
    help="Knowledge editing for Mixture-of-Experts language models.", no_args_is_help=True, add_completion=False
)


@app.callback()
def _setup(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")] = False) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")


for command in (compare, plan, methods, evaluate):
    app.command()(command)


def main() -> None:
    """Entry point of the console script."""
    app()
