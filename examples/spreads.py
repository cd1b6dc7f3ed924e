"""How an edit is spread over layers: each value of `spread`, rounds and shares of `once`, on one batch of facts.

python examples/spreads.py --out results/spreads
"""

from __future__ import annotations

import argparse

from rich.console import Console
from variants import compared

from easyedit_moe import load_hyperparams
from easyedit_moe.comparison import report

ONCE: dict[str, object] = {"spread": "once"}
PAPER: dict[str, object] = {"spread": "update", "whitening": "in"}
SHARES: dict[str, list[float]] = {
    "equal parts": [0.25, 0.25, 0.25, 0.25],
    "half each": [0.5, 0.5, 0.5, 0.5],
    "all each": [1.0, 1.0, 1.0, 1.0],
    "1 / root of layers left": [0.5, 0.577, 0.707, 1.0],
    "1 / layers left, reversed": [1.0, 0.5, 0.333, 0.25],
    "reversed, adding up to 1": [0.48, 0.24, 0.16, 0.12],
    "the first alone": [1.0, 0.0, 0.0, 0.0],
    "the last two": [0.0, 0.0, 0.5, 1.0],
}
"""Of the bundled model's four layers; 1 / layers left is what stands for no shares: 0.25, 0.333, 0.5, 1."""
TWICE = ("equal parts", "1 / layers left, reversed", "reversed, adding up to 1")


def _of(method: str) -> list[tuple[str, str, dict[str, object]]]:
    """Each value of spread, and rounds of once."""
    spreads = [(f"{method}, {how}", method, {"spread": how}) for how in ("update", "last", "residual", "once")]
    return [*spreads, *((f"{method}, once, {n} rounds", method, {**ONCE, "rounds": n}) for n in (2, 3))]


VARIANTS: list[tuple[str, str, dict[str, object]]] = [
    ("MoTE, paper (update, whitening in)", "MoTE", PAPER),
    *_of("MoTE"),
    *_of("Global"),
    *((f"Global, once, {name}", "Global", {**ONCE, "shares": shares}) for name, shares in SHARES.items()),
    *((f"Global, once, {n}, 2 rounds", "Global", {**ONCE, "shares": SHARES[n], "rounds": 2}) for n in TWICE),
    ("MoTE, once, equal parts, 2 rounds", "MoTE", {**ONCE, "shares": SHARES["equal parts"], "rounds": 2}),
    ("MoEEdit-BCD, once", "MoEEdit-BCD", ONCE),
    ("MoEEdit-BCD, variant paper", "MoEEdit-BCD", {}),
    ("MoEEdit-BCD, variant code", "MoEEdit-BCD", {"variant": "code"}),
    ("MoE-MEMIT, residual", "MoE-MEMIT", {}),
    ("MoE-MEMIT, once", "MoE-MEMIT", ONCE),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results/spreads")
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=50)
    args = parser.parse_args()
    folder = report.check_folder(args.out)
    settings = {name: load_hyperparams(f"{method}/factworld", **changes) for name, method, changes in VARIANTS}
    console = Console()
    _, result = compared(settings, console, args.edits, args.skip, args.batch_size)
    report.write_results(result, folder)
    console.print(report.tables(result)[0])


if __name__ == "__main__":
    main()
