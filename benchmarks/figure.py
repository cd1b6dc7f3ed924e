"""Draws the figure of the README from results: ``python -m benchmarks.figure benchmarks/results/<machine>.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Rows = list[dict[str, Any]]


def main(
    results: Annotated[Path, typer.Argument(help="JSON file that python -m benchmarks wrote.")],
    out: Annotated[Path, typer.Option(help="PNG file.")] = Path("docs/benchmarks.png"),
) -> None:
    """Solvers and targets as bars, growth with the number of edits as lines; suites that were not run stay empty."""
    suites = json.loads(results.read_text(encoding="utf-8"))["suites"]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    _solvers(left, suites.get("solvers", {}).get("rows", []))
    _targets(middle, suites.get("targets", {}).get("rows", []))
    _growth(right, suites.get("growth", {}).get("rows", []))
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=110)
    typer.echo(f"Written: {out}")


def _solvers(axis: Any, rows: Rows) -> None:
    rows = [row for row in rows if row["benchmark"] == "solvers" and row["tokens"] == 50]
    labels = [f"{row['solver']} ({row['model']})" for row in rows]
    colours = ["#b5446e" if row["solver"].startswith("naive") else "#1b6ca8" for row in rows]
    axis.barh(range(len(rows)), [row["seconds"] for row in rows], color=colours)
    axis.set_yticks(range(len(rows)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="seconds", title="One layer's system, 50 edits")
    if rows:
        axis.set_xscale("log")


def _targets(axis: Any, rows: Rows) -> None:
    rows = [row for row in rows if row["benchmark"] == "targets"]
    axis.barh(range(len(rows)), [row["seconds"] for row in rows], color="#4a9d5b")
    labels = [f"{row['way']}, {row['contexts']} contexts" for row in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="seconds", title="Target vectors")


def _growth(axis: Any, rows: Rows) -> None:
    rows = [row for row in rows if row["benchmark"] == "growth with T"]
    for what in dict.fromkeys(row["what"] for row in rows):
        points = [(row["T"], row["seconds"]) for row in rows if row["what"] == what]
        axis.plot(*zip(*points, strict=True), marker="o", label=what)
    axis.set(xlabel="edits in one batch", ylabel="seconds", title="Growth with the batch")
    if rows:
        axis.set(xscale="log", yscale="log")
        axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    typer.run(main)
