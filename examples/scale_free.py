"""Ridge and null space in a model's own units: what an edit is worth by `lambda_relative` and by null space.

python examples/scale_free.py --out results/scale-free
"""

from __future__ import annotations

import argparse

from rich.console import Console
from variants import compared

from easyedit_moe import load_hyperparams
from easyedit_moe.comparison import report

NO_THRESHOLD: dict[str, object] = {"nullspace_threshold": None, "nullspace_relative": False}
RIDGES = (0.01, 0.1, 0.3, 1.0)


def _in_units(share: float, **null_space: float) -> dict[str, object]:
    threshold = NO_THRESHOLD if null_space else {}
    return {"lambda_reg": None, "lambda_relative": share, **threshold, **null_space}


VARIANTS: list[tuple[str, str, dict[str, object]]] = [
    ("lambda_reg 0.1, threshold 1e-3 (shipped)", "Global", {}),
    *((f"lambda_relative {x:g}, rank 0.75", "Global", _in_units(x, nullspace_rank=0.75)) for x in RIDGES),
    *((f"lambda_relative 0.1, rank {x:g}", "Global", _in_units(0.1, nullspace_rank=x)) for x in (0.6, 0.9)),
    *((f"lambda_relative 0.1, energy {x:g}", "Global", _in_units(0.1, nullspace_energy=x)) for x in (0.99, 0.95, 0.9)),
    ("lambda_relative 0.1, threshold 1e-3", "Global", _in_units(0.1)),
    ("MoTE, lambda_relative 0.1, rank 0.75", "MoTE", _in_units(0.1, nullspace_rank=0.75)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results/scale-free")
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--skip", type=int, default=200)
    args = parser.parse_args()
    folder = report.check_folder(args.out)
    settings = {name: load_hyperparams(f"{method}/factworld", **changes) for name, method, changes in VARIANTS}
    console = Console()
    _, result = compared(settings, console, args.edits, args.skip, args.edits)
    report.write_results(result, folder)
    console.print(report.tables(result)[0])


if __name__ == "__main__":
    main()
