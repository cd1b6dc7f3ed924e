"""The suites that ``python -m benchmarks`` knows. To add one, add a line here.

A suite is a module of this package with a dataclass ``Options`` and ``run(options) -> list of rows``; a row is a flat
dict that JSON takes, with "benchmark" naming the table it belongs to. ``--device`` and ``--quick`` are handed over
where ``Options`` has a field of that name; ``quick`` below are the fields to set for a reduced run otherwise.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Suite:
    """Where a suite lives, and its options for ``--quick``."""

    module: str
    quick: dict[str, Any] = field(default_factory=dict)

    @property
    def available(self) -> bool:
        """Whether the module is there."""
        return importlib.util.find_spec(self.module) is not None

    def run(self, quick: bool, device: str) -> list[dict[str, Any]]:
        """All rows of the suite."""
        module = importlib.import_module(self.module)
        known = {item.name for item in fields(module.Options)}
        values = {"device": device, "quick": quick, **(self.quick if quick else {})}
        return module.run(module.Options(**{name: value for name, value in values.items() if name in known}))


SUITES = {
    "solvers": Suite("benchmarks.solvers"),
    "targets": Suite("benchmarks.targets", {"requests": 4, "one_at_a_time": 2}),
    "statistics": Suite("benchmarks.statistics", {"shape": "factworld", "layers": 2, "texts": 32, "repeats": 2}),
    "end-to-end": Suite("benchmarks.end_to_end"),
    "growth": Suite("benchmarks.growth"),
    "cores": Suite("benchmarks.cores"),
    "checkpoints": Suite("benchmarks.checkpoints"),
    "endurance": Suite("benchmarks.endurance"),
    "plan": Suite("benchmarks.plan"),
    "peak": Suite("benchmarks.peak"),
    "dense-bcd": Suite("benchmarks.dense_bcd"),
    "prepare": Suite("benchmarks.prepare"),
}
