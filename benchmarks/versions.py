"""Another version of the package beside this one, in pairs: what the same edits cost with the code of both.

python -m benchmarks.versions ../before --pairs 2

``before`` is a checkout of another commit (``git worktree add ../before COMMIT``). Each figure is measured in a process
of its own by `benchmarks.one_version`, by turns with the code of the one and of the other. Statistics are collected by
the first run of each version and read by its later ones. Most of a batch is forwards here, which are transformers' own
and slow in bfloat16 on a CPU.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.__main__ import table
from benchmarks.harness import RESULTS, ROOT, git, source, write_results

METHODS = "Global,MoTE,MoEEdit-BCD"
COLD = "prepare"
"""What only the first run of a version does in full."""


def main(
    before: Annotated[Path, typer.Argument(help="A checkout of the other version.")],
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = METHODS,
    pairs: Annotated[int, typer.Option(help="Runs of each version.")] = 2,
    edits: Annotated[int, typer.Option(help="In batches, one after the other.")] = 1000,
    batch: Annotated[int, typer.Option(help="Edits in a batch.")] = 50,
    single: Annotated[int, typer.Option(help="Edits one by one, after the batches.")] = 50,
    out: Annotated[Path, typer.Option(help="Folder of the JSON file, one per machine.")] = RESULTS,
) -> None:
    """Measure, print the table, and write the rows to <out>/<machine>.json."""
    made, commit = source(), git("rev-parse", "HEAD", checkout=before)
    sizes = ("--edits", str(edits), "--batch", str(batch), "--single", str(single))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for method in methods.split(","):
            for remember in (False, True):
                found = _pairs(before, Path(folder), method, remember, pairs, sizes)
                about = {"benchmark": "two versions", "method": method, "remember_edits": remember, "edits": edits}
                about |= {"batch": batch, "single edits": single, "pairs": pairs, "before": commit}
                rows += [about | row for row in compared(*found, cold=not rows)]
                write_results(out, False, {"versions": rows}, made)
    Console(width=190).print(table("two versions", rows))


def compared(
    before: Sequence[dict[str, float]], after: Sequence[dict[str, float]], cold: bool = False
) -> list[dict[str, Any]]:
    """Per figure, the medians of both versions and the median of the ratios within pairs; if the first pair is the one
    that found nothing ``cold``, also what it took to prepare.
    """
    rows = []
    for name in before[0]:
        both = [(one[name], other[name]) for one, other in zip(before, after, strict=True)]
        if name == COLD:
            both = both[:1] if cold else []
        if not both:
            continue
        ratios = [one / other for one, other in both]
        middle = [statistics.median(side) for side in zip(*both, strict=True)]
        unit = "bytes" if name.startswith("resident") else "s"
        row = {"figure": name, "unit": unit, "before's": middle[0], "this one's": middle[1]}
        rows.append(row | {"before / this": statistics.median(ratios)})
    return rows


def _pairs(
    before: Path, folder: Path, method: str, remember: bool, pairs: int, sizes: Sequence[str]
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Rows of both versions; which one begins changes from pair to pair."""
    found: dict[Path, list[dict[str, float]]] = {before: [], ROOT: []}
    for number in range(pairs):
        order = [before, ROOT] if number % 2 == 0 else [ROOT, before]
        for checkout in order:
            place = folder / ("after" if checkout == ROOT else "before")
            place.mkdir(exist_ok=True)
            found[checkout].append(_run(checkout, place, method, remember, sizes))
    return found[before], found[ROOT]


def _run(checkout: Path, folder: Path, method: str, remember: bool, sizes: Sequence[str]) -> dict[str, float]:
    # As text: of the script's own folder nothing is to be imported.
    script = (Path(__file__).parent / "one_version.py").read_text(encoding="utf-8")
    command = [sys.executable, "-c", script, method, str(folder), *sizes, *(["--remember"] if remember else [])]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    done = subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


if __name__ == "__main__":
    typer.run(main)
