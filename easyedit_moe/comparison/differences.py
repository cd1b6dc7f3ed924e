"""Which methods differ from the best one: paired tests on the same records, corrected for their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from easyedit_moe.comparison.rows import PRE_EDIT, SCORES, Row
from easyedit_moe.evaluation.paired import LEVEL, PairedTest, holm, paired_test

MEANING = (
    "Differs from the best: scores in which a method differs from the one with the highest mean, paired on the same "
    "records (McNemar where all values are 0 or 1, else sign test; both exact, two-sided), at "
    f"{100 * LEVEL:.0f} % after Holm's correction for the number of methods."
)


@dataclass(frozen=True)
class Difference:
    """One score of a method against the best method's.

    Attributes:
        best: its name.
        paired: the test; None where this is the best, or one of both has no values.
        p_adjusted: p after Holm's correction for the number of methods; None without a test.
    """

    best: str
    paired: PairedTest | None = None
    p_adjusted: float | None = None

    @property
    def differs(self) -> bool:
        """Whether the difference counts."""
        return self.p_adjusted is not None and self.p_adjusted < LEVEL

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        test = None if self.paired is None else asdict(self.paired)
        return {"best": self.best, "test": test, "p_adjusted": self.p_adjusted, "differs": self.differs}


def differences(rows: Sequence[Row]) -> list[dict[str, Difference]]:
    """Per row, by score; empty for the unedited model, and without two methods to compare."""
    out: list[dict[str, Difference]] = [{} for _ in rows]
    methods = [number for number, row in enumerate(rows) if row.method != PRE_EDIT]
    for name in SCORES:
        scores = {i: getattr(rows[i].scores, name) for i in methods}
        known = [i for i in methods if scores[i].count and scores[i].values]
        if len(known) < 2:
            continue
        best = max(known, key=lambda i: scores[i].mean)
        others = [i for i in known if i != best]
        tests = [paired_test(scores[i].values, scores[best].values) for i in others]
        adjusted = holm([1.0 if test is None else test.p for test in tests])
        out[best][name] = Difference(rows[best].method)
        for i, test, p in zip(others, tests, adjusted, strict=True):
            out[i][name] = Difference(rows[best].method, test, None if test is None else p)
    return out


def said(found: dict[str, Difference]) -> str:
    """The scores in which a method differs, as a table's cell; "-" where nothing was compared."""
    if not found:
        return "-"
    return ", ".join(name for name, one in found.items() if one.differs) or "no"
