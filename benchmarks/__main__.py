"""``python -m benchmarks SUITE|all`` (the suites are in `benchmarks.registry`): tables out, JSON beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness import RESULTS, source, write_results
from benchmarks.registry import SUITES


def main(
    suite: Annotated[str, typer.Argument(help=f"all, or one of {', '.join(SUITES)}.")] = "all",
    quick: Annotated[bool, typer.Option(help="Reduced shapes: proves that everything runs, in seconds.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as torch chooses.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the JSON file, one per machine.")] = RESULTS,
) -> None:
    """Measure, print one table per benchmark, and write the rows to <out>/<machine>.json."""
    if suite != "all" and suite not in SUITES:
        raise typer.BadParameter(f"{suite!r} is not all, nor one of {', '.join(SUITES)}.", param_hint="suite")
    if suite != "all" and not SUITES[suite].available:
        raise typer.BadParameter(f"The suite {suite} is not in this checkout.", param_hint="suite")
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    wide = Console(width=max(console.width, 190))
    made = source()  # before the first suite: a commit made while it runs is not what it measures
    for name in [suite] if suite != "all" else [n for n, s in SUITES.items() if s.available]:
        rows = SUITES[name].run(quick, device)
        for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
            wide.print(table(benchmark, [row for row in rows if row["benchmark"] == benchmark]))
        # After each suite, so that an interruption keeps what was measured.
        path = write_results(out, quick, {name: rows}, made)
        console.print(f"Written: {path}", highlight=False)


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """One row per measurement; a column per key that any of them has."""
    columns = [c for c in dict.fromkeys(key for row in rows for key in row) if c != "benchmark"]
    out = Table(title=title)
    for column in columns:
        number = all(isinstance(row.get(column, 0), (int, float, type(None))) for row in rows)
        out.add_column(column.replace("_", " "), justify="right" if number else "left")
    for row in rows:
        out.add_row(*(_cell(row.get(column)) for column in columns))
    return out


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


if __name__ == "__main__":
    typer.run(main)
