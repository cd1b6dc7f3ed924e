"""``easyedit-moe methods``."""

from __future__ import annotations

from typing import Annotated

import typer

from easyedit_moe.commands.printing import show_table


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
    from rich.text import Text

    from easyedit_moe.hparams import hparams_folder, presets

    table = Table("method", "code", "edits", "statistics", "from", "hparams for")
    for method in [*presets.own_methods(), *presets.host_methods()]:
        models = ", ".join(sorted(path.stem for path in (hparams_folder() / method.name).glob("*.yaml")))
        needed = "yes" if method.statistics else "no"
        table.add_row(Text(method.name, "bold"), method.code, method.edits, needed, method.source, models)
    show_table(table)


def _show(path: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from easyedit_moe.hparams.sources import sourced_values

    table = Table("setting", "value", "said in", "source", title=path)
    for item in sourced_values(path):
        table.add_row(*(Text(str(cell)) for cell in (item.name, item.value, item.said_in, item.source)))
    show_table(table)
