"""Our editors and EasyEdit's own side by side on the bundled model, by the papers' protocol and by EasyEdit's.

The same as: easyedit-moe compare --methods MoTE MoEEdit-BCD Global+speedup ROME MEMIT AlphaEdit FT FT-L

Needs EasyEdit: set EASYEDIT_HOME to a clone of https://github.com/zjunlp/EasyEdit.
Run: EASYEDIT_HOME=/path/to/EasyEdit python examples/easyedit_comparison.py [number of edits]
"""

from __future__ import annotations

import sys

from rich.console import Console

from easyedit_moe.comparison import report
from easyedit_moe.comparison.compare import compare
from easyedit_moe.comparison.settings import resolve_hparams
from easyedit_moe.comparison.task import load_task

METHODS = ("MoTE", "MoEEdit-BCD", "Global+speedup", "ROME", "MEMIT", "AlphaEdit", "FT", "FT-L")


def main() -> None:
    edits = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    settings = [resolve_hparams(method, "factworld", None, {}) for method in METHODS]
    task = load_task("factworld", "factworld", edits, skip=0, batch_size=50, dtype="float32", device="cpu")
    result = compare(task, settings, on_row=lambda row: print(f"{row.method} done"), easyedit_metrics=True)
    console = Console(width=180)
    for table in report.tables(result):
        console.print(table)


if __name__ == "__main__":
    main()
