"""Statistics of the bundled model's corpus against those of its own samples, and what low_coverage costs.

python examples/statistics_sources.py --out results/statistics
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from variants import compared

from easyedit_moe import load_hyperparams, make_editor
from easyedit_moe.comparison import report
from easyedit_moe.comparison.task import Task
from easyedit_moe.storage.strict_json import write_json

WIDTH = 144
"""h of the bundled model: an expert with fewer tokens has a moment of less than full rank."""
GENERATED: dict[str, object] = {"mom2_dataset": "generated"}
THIN: dict[str, object] = {**GENERATED, "mom2_n_samples": 8, "coverage_target": None, "min_coverage": WIDTH}
VARIANTS: list[tuple[str, dict[str, object]]] = [
    ("corpus", {}),
    ("generated", GENERATED),
    *((f"8 samples, low_coverage {how}", {**THIN, "low_coverage": how}) for how in ("keep", "identity", "pooled")),
    ("8 samples, low_coverage frozen", {**THIN, "low_coverage": "frozen"}),
]


def prepared(task: Task, changes: dict[str, object]) -> dict[int, Any]:
    """Layer -> what Global prepares, statistics from the cache."""
    return (
        make_editor(load_hyperparams("Global/factworld", **changes), progress=False)
        .prepare(task.model, task.tok)
        .layers
    )


def overlap(one: Any, other: Any) -> dict[str, float]:
    """Of two null spaces per expert, ``||P Q||^2 / min(rank P, rank Q)``: the share of the smaller one that lies in the
    other; for chance alone max(rank P, rank Q) / h. Means over the experts.
    """
    shares, chances, ranks = [], [], []
    for p, q in zip(one.metric.projectors, other.metric.projectors, strict=True):
        eye = torch.eye(p.basis.shape[0], dtype=torch.float64)
        shares.append(float((p(eye) @ q(eye)).square().sum()) / max(min(p.rank, q.rank), 1))
        chances.append(max(p.rank, q.rank) / len(eye))
        ranks.append((p.rank, q.rank))
    mean = [sum(values) / len(values) for values in zip(*ranks, strict=True)]
    count = len(shares)
    return {
        "overlap": sum(shares) / count,
        "by_chance": sum(chances) / count,
        "rank_corpus": mean[0],
        "rank_other": mean[1],
    }


def coverage(layer: Any) -> dict[str, int]:
    counts = layer.coverage
    return {"least": int(counts.min()), "median": int(counts.median()), "below_h": int((counts < WIDTH).sum())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results/statistics")
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--stats-dir", default="")
    args = parser.parse_args()
    folder = report.check_folder(args.out)
    place = {"stats_dir": args.stats_dir or str(Path(folder) / "stats")}
    settings = {name: load_hyperparams("Global/factworld", **{**changes, **place}) for name, changes in VARIANTS}
    console = Console()
    task, result = compared(settings, console, args.edits, 0, args.batch_size)
    corpus = prepared(task, place)
    spaces = {}
    for name, changes in VARIANTS:
        found = prepared(task, {**changes, **place})
        spaces[name] = {
            str(layer): {"tokens_per_expert": coverage(found[layer]), **overlap(corpus[layer], found[layer])}
            for layer in found
        }
    write_json(Path(folder) / "results.json", {**result.to_dict(), "null_spaces_against_the_corpus": spaces})
    console.print(report.tables(result)[0])
    for name, layers in spaces.items():
        mean = {key: sum(one[key] for one in layers.values()) / len(layers) for key in ("overlap", "by_chance")}
        console.print(name, {key: round(value, 3) for key, value in mean.items()}, layers["0"]["tokens_per_expert"])


if __name__ == "__main__":
    main()
