"""The README's second table: editors without their null space, MoTE per whitening and as in its paper, lifted methods.

python examples/ablations.py --out results/ablations
"""

from __future__ import annotations

import argparse

from rich.console import Console

from easyedit_moe import load_hyperparams
from easyedit_moe.comparison import report
from easyedit_moe.comparison.compare import compare
from easyedit_moe.comparison.task import load_task

VARIANTS: list[tuple[str, str, dict[str, object]]] = [
    ("MoTE, update spread (paper)", "MoTE", {"spread": "update", "whitening": "in", "metric": "nullspace"}),
    ("MoTE, no null space", "MoTE", {"metric": "identity"}),
    ("MoTE, whitening none", "MoTE", {"whitening": "none"}),
    ("MoTE, whitening in", "MoTE", {"whitening": "in"}),
    ("MoTE, whitening out", "MoTE", {"whitening": "out"}),
    ("MoTE, whitening both", "MoTE", {"whitening": "both"}),
    ("MoEEdit-BCD, no null space", "MoEEdit-BCD", {"metric": "identity"}),
    ("BCD+speedup, no null space", "BCD+speedup", {"metric": "identity"}),
    ("Global, no null space", "Global", {"metric": "identity"}),
    ("Global, forgetting earlier edits", "Global", {"remember_edits": False}),
    ("Global, no context prefixes", "Global", {"context_prefixes": []}),
    ("Global+speedup, no null space", "Global+speedup", {"metric": "identity"}),
    ("MoE-ROME", "MoE-ROME", {}),
    ("MoE-MEMIT", "MoE-MEMIT", {}),
    ("MoE-AlphaEdit", "MoE-AlphaEdit", {}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results/ablations")
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=50)
    args = parser.parse_args()
    folder = report.check_folder(args.out)
    settings = [load_hyperparams(f"{method}/factworld", **changes) for _, method, changes in VARIANTS]
    task = load_task("factworld", "factworld", args.edits, 0, args.batch_size, "float32", "cpu")
    console = Console()
    result = compare(
        task, settings, on_row=lambda row: console.print("done:", row.method), labels=[name for name, _, _ in VARIANTS]
    )
    report.write_results(result, folder)
    console.print(report.tables(result)[0])


if __name__ == "__main__":
    main()
