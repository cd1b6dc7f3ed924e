"""``easyedit-moe methods``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from easyedit_moe.commands.reporting import errors_reported

if TYPE_CHECKING:
    from rich.table import Table

TABLE_WIDTH = 150


def methods(
    show: Annotated[
        str, typer.Option(help="METHOD/MODEL, or a YAML file: print all its settings and whose choice each is.")
    ] = "",
) -> None:
    """List all methods and the models that hparams ship for, or show one method's settings with their sources."""
    if show:
        _show(show)
    else:
        _list()


def _list() -> None:
    from rich.table import Table

    from easyedit_moe.hparams import hparams_folder, presets

    table = Table("method", "code", "edits", "statistics", "from", "hparams for")
    for method in [*presets.own_methods(), *presets.host_methods()]:
        models = ", ".join(sorted(path.stem for path in (hparams_folder() / method.name).glob("*.yaml")))
        needed = "yes" if method.statistics else "no"
        table.add_row(f"[bold]{method.name}[/]", method.code, method.edits, needed, method.source, models)
    _print(table)


def _show(path: str) -> None:
    from rich.table import Table

    with errors_reported():
        from easyedit_moe.hparams.sources import sourced_values

        values = sourced_values(path)
    table = Table("setting", "value", "said in", "source", title=path)
    for item in values:
        table.add_row(item.name, str(item.value), item.said_in, item.source)
    _print(table)


def _print(table: Table) -> None:
    """In full width: a narrower terminal wraps whole lines."""
    from rich.console import Console

    Console(width=max(Console().width, TABLE_WIDTH)).print(table, highlight=False)
