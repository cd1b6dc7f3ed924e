"""A row of a comparison: what a method scored and what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from easyedit_moe.comparison.retention import SCORES, Retention
from easyedit_moe.evaluation.metrics import EvaluationResult
from easyedit_moe.evaluation.summary import Score

PRE_EDIT = "pre-edit"


@dataclass(frozen=True)
class Row:
    """One line of the table: a method's scores after all edits, and what they cost.

    ``scores`` follow the papers' protocol, ``easyedit`` EasyEdit's own (None unless asked for). ``rounding_loss`` is
    the largest share of an update that the weights' dtype swallowed at one write, ``warnings`` what was to be told of
    the edits, batch by batch. Of a random method that was run by several ``seeds``, scores, routing and seconds are
    means over them, and ``per_seed`` has the means of each. ``retention`` are scores on the way and ``answers`` those
    of real answers, where they were asked for.
    """

    method: str
    edits: str
    code: str
    scores: EvaluationResult
    routing: dict[str, Any]
    seconds: dict[str, float]
    peak_memory_bytes: int
    targets_reached: int | None = None
    rounding_loss: float | None = None
    hparams: dict[str, Any] = field(default_factory=dict)
    easyedit: dict[str, Score] | None = None
    warnings: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    per_seed: tuple[dict[str, float], ...] = ()
    retention: Retention | None = None
    answers: dict[str, Score] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        scores = self.scores.to_dict()
        return {
            "method": self.method,
            "edits": self.edits,
            "code": self.code,
            "protocol": self.scores.protocol,
            **{name: scores[name] for name in SCORES},
            "routing_similarity": self.routing,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "targets_reached": self.targets_reached,
            "rounding_loss": self.rounding_loss,
            "warnings": list(self.warnings),
            "easyedit": None if self.easyedit is None else {name: asdict(s) for name, s in self.easyedit.items()},
            "hparams": self.hparams,
            "seeds": list(self.seeds),
            "per_seed": list(self.per_seed),
            "retention": None if self.retention is None else self.retention.to_dict(),
            "answers": None if self.answers is None else {name: asdict(s) for name, s in self.answers.items()},
        }
