"""Draws docs/benchmarks.png from results: ``python -m benchmarks.figure benchmarks/results/<machine>.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.dense_bcd import ANEW, RUNNING, WRITTEN
from benchmarks.dense_bcd import OURS as OWN

PUBLIC = "MoEEdit's public code as we read it:\nall experts anew at each visit, O(E\u00b2)"
Rows = list[dict[str, Any]]


OURS, BASELINE, READING = "#1b6ca8", "#d08b2c", "#b5446e"


def main(
    results: Annotated[Path, typer.Argument(help="JSON file that python -m benchmarks wrote.")],
    out: Annotated[Path, typer.Option(help="PNG file.")] = Path("docs/benchmarks.png"),
) -> None:
    """BCD beside its baselines, solvers and targets as bars, growth with the number of edits as lines.

    Suites that were not run stay empty.
    """
    suites = json.loads(results.read_text(encoding="utf-8"))["suites"]
    rows = {name: suite["rows"] for name, suite in suites.items()}
    figure, axes = plt.subplots(2, 2, figsize=(14, 7.6), layout="constrained")
    _bcd(axes[0, 0], bcd_bars(rows.get("dense-bcd", []), rows.get("solvers", [])))
    _solvers(axes[0, 1], rows.get("solvers", []))
    _targets(axes[1, 0], rows.get("targets", []))
    _growth(axes[1, 1], rows.get("growth", []))
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=110)
    typer.echo(f"Written: {out}")


def bcd_bars(dense: Rows, solvers: Rows) -> list[tuple[str, float, str]]:
    """Label, seconds and colour of each way of BCD: the main comparison first, the O(E^2) reading last.

    The reading is of the suite ``dense-bcd`` where it ran there, and else of ``solvers``, which its label says.
    """
    labels = {
        OWN: ("ours: factored blocks", OURS), WRITTEN: ("ours, dense update written out", OURS),
        RUNNING: ("baseline: running residual,\ndense updates, O(E)", BASELINE), ANEW: (PUBLIC, READING),
    }  # fmt: skip
    found = {row["way"]: row["seconds"] for row in dense}
    bars = [(label, found[way], colour) for way, (label, colour) in labels.items() if way in found]
    if found and ANEW not in found:
        model = dense[0]["model"]
        naive = [row for row in solvers if row.get("solver", "").startswith("naive") and row["model"] == model]
        bars += [
            (f"{PUBLIC}\n(another run: suite solvers)", row["seconds"], READING) for row in naive if row["tokens"] == 50
        ]
    return bars


def _bcd(axis: Any, bars: list[tuple[str, float, str]]) -> None:
    axis.barh(range(len(bars)), [seconds for _, seconds, _ in bars], color=[colour for _, _, colour in bars])
    axis.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="seconds", title="Four passes of BCD, Qwen3-30B-A3B's shape, one layer, 50 edits")
    for place, (_, seconds, _) in enumerate(bars):
        axis.annotate(f" {seconds:.3g} s", (seconds, place), va="center", fontsize=8)
    if bars:
        axis.set_xscale("log")
        axis.margins(x=0.12)


def _solvers(axis: Any, rows: Rows) -> None:
    rows = [row for row in rows if row["benchmark"] == "solvers" and row["tokens"] == 50]
    rows = [row for row in rows if not row["solver"].startswith("naive")]
    labels = [f"{row['solver']} ({row['model']})" for row in rows]
    axis.barh(range(len(rows)), [row["seconds"] for row in rows], color=OURS)
    axis.set_yticks(range(len(rows)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="seconds", title="Our solvers: one layer's system, 50 edits")
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
