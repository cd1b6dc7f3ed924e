"""How an edit is spread over layers: each value of `spread`, rounds and shares of `once`, on one batch of facts.

python examples/spreads.py --out results/spreads
"""

from __future__ import annotations

import argparse

from rich.console import Console

from easyedit_moe import load_hyperparams
from easyedit_moe.comparison import report
from easyedit_moe.comparison.compare import compare
from easyedit_moe.comparison.task import load_task

ONCE: dict[str, object] = {"spread": "once"}
PAPER: dict[str, object] = {"spread": "update", "whitening": "in"}
SHARES: dict[str, list[float]] = {
    "equal parts": [0.25, 0.25, 0.25, 0.25],
    "half of 1 / layers left": [0.125, 0.167, 0.25, 0.5],
    "1.5 of 1 / layers left": [0.375, 0.5, 0.75, 1.5],
    "1 / root of layers left": [0.5, 0.577, 0.707, 1.0],
    "half each": [0.5, 0.5, 0.5, 0.5],
    "all each": [1.0, 1.0, 1.0, 1.0],
    "1 / layers left, reversed": [1.0, 0.5, 0.333, 0.25],
    "the last two": [0.0, 0.0, 0.5, 1.0],
}
VARIANTS: list[tuple[str, str, dict[str, object]]] = [
    ("MoTE, paper (update, whitening in)", "MoTE", PAPER),
    *(
        (f"{m}, {how}", m, {"spread": how})
        for m in ("MoTE", "Global")
        for how in ("update", "last", "residual", "once")
    ),
    *((f"{m}, once, {n} rounds", m, {**ONCE, "rounds": n}) for m in ("MoTE", "Global") for n in (2, 3, 4)),
    *((f"Global, once, {name}", "Global", {**ONCE, "shares": shares}) for name, shares in SHARES.items()),
    ("Global, once, all each, 2 rounds", "Global", {**ONCE, "shares": SHARES["all each"], "rounds": 2}),
    ("Global, once, equal parts, 2 rounds", "Global", {**ONCE, "shares": SHARES["equal parts"], "rounds": 2}),
    ("MoEEdit-BCD, once", "MoEEdit-BCD", ONCE),
    ("MoEEdit-BCD, once, 2 rounds", "MoEEdit-BCD", {**ONCE, "rounds": 2}),
    ("MoEEdit-BCD, variant paper", "MoEEdit-BCD", {}),
    ("MoEEdit-BCD, variant code", "MoEEdit-BCD", {"variant": "code"}),
    ("MoE-MEMIT, once, 2 rounds", "MoE-MEMIT", {**ONCE, "rounds": 2}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results/spreads")
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=50)
    args = parser.parse_args()
    folder = report.check_folder(args.out)
    settings = [load_hyperparams(f"{method}/factworld", **changes) for _, method, changes in VARIANTS]
    task = load_task("factworld", "factworld", args.edits, args.skip, args.batch_size, "float32", "cpu")
    console = Console()
    labels = [name for name, _, _ in VARIANTS]
    result = compare(task, settings, on_row=lambda row: console.print("done:", row.method), labels=labels)
    report.write_results(result, folder)
    console.print(report.tables(result)[0])


if __name__ == "__main__":
    main()
