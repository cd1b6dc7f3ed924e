"""The tables of the MoTE paper (arXiv 2605.16686) as data: their rows, what each row changes, and published figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from easyedit_moe.errors import DataError, did_you_mean
from easyedit_moe.hparams.models import OUTLINES, config_outline, short_name

COUNTERFACT, ZSRE = "counterfact", "zsre"
"""What the two data sets of table 1 are called here; each may be any file of records."""


@dataclass(frozen=True)
class Line:
    """A row of a table.

    Attributes:
        label: what the row is called; no other row of its table has it.
        method: as in the table of methods, ours or EasyEdit's.
        changes: settings that count more than the method's file for the model.
    """

    label: str
    method: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def but(self, label: str, **changes: Any) -> Line:
        """The same with other settings, under another name."""
        return Line(label, self.method, {**self.changes, **changes})


@dataclass(frozen=True)
class PaperTable:
    """A table.

    Attributes:
        name: its number in the paper, or "ablations".
        title: what it compares.
        lines: rows, in the paper's order.
        columns: of `easyedit_moe.comparison.paper_report`, after the rows' names; "routing" stands for all windows.
        ready_targets: whether every method gets the same targets, found at the unedited weights (see `compare`).
        data: the data sets that it is made on.
    """

    name: str
    title: str
    lines: tuple[Line, ...]
    columns: tuple[str, ...]
    ready_targets: bool = True
    data: tuple[str, ...] = (COUNTERFACT,)

    @property
    def heading(self) -> str:
        """Number and title; the title alone for what is not in the paper."""
        return f"Table {self.name}: {self.title}" if self.name.isdecimal() else self.title


_SCORES = ("efficacy", "generalisation", "specificity", "utility", "differs from the best")
_SECONDS = ("targets s", "statistics s", "solve s", "write s", "total s")

_RESIDUAL = {"spread": "residual", "rounds": 1, "shares": []}

# The paper's whole setting of MoTE. Lambda, eps, layers and null space are the model's, and in its file.
MOTE = Line("MoTE (paper)", "MoTE", {**_RESIDUAL, "spread": "update", "whitening": "in", "metric": "nullspace"})
MOTE_RESIDUAL = MOTE.but("MoTE, residual", spread="residual")
BCD = Line("MoEEdit-BCD", "MoEEdit-BCD", {**_RESIDUAL, "variant": "paper"})
GLOBAL = Line("Global", "Global", _RESIDUAL)
BCD_SPEEDUP, GLOBAL_SPEEDUP = Line("BCD+speedup", "BCD+speedup"), Line("Global+speedup", "Global+speedup")
GLOBAL_TWICE = GLOBAL.but("Global, once, 2 rounds", spread="once", rounds=2)

SOLVERS = (BCD, BCD_SPEEDUP, GLOBAL, GLOBAL_SPEEDUP, MOTE, MOTE_RESIDUAL)
"""The paper's solvers by how their solution is spread over layers, and those that the paper leaves out between them."""
SPREADS = (
    BCD.but("MoEEdit-BCD (its code)", variant="code"),
    GLOBAL.but("Global, once", spread="once"),
    GLOBAL_TWICE,
    GLOBAL.but("Global, last layer", spread="last"),
    MOTE.but("MoTE, once", spread="once"),
    MOTE.but("MoTE, last layer", spread="last"),
)
"""Further ways to spread, which are ours, and MoEEdit as its code has it."""

_METHODS = (
    *(Line(name, name) for name in ("FT", "MoE-FT", "FT-L", "MoE-FT-L", "LoRA", "MoE-LoRA", "AdaLoRA", "UnKE", "WISE")),
    *(Line(name, name) for name in ("MEMoE", "ROME", "MoE-ROME", "MEMIT", "MoE-MEMIT", "AlphaEdit", "MoE-AlphaEdit")),
    BCD, MOTE, GLOBAL, GLOBAL_TWICE, Line("MoTE (ours)", "MoTE", _RESIDUAL),
)  # fmt: skip
_WHITENING = tuple(
    line.but(f"{spread}, whitening {whitening}", whitening=whitening)
    for line, spread in ((MOTE, "update (paper)"), (MOTE_RESIDUAL, "residual"))
    for whitening in ("none", "in", "out", "both")
)
_NULL_SPACE = tuple(
    line.but(f"{line.label}, {which}", metric=metric)
    for line in SOLVERS
    for which, metric in (("with", "nullspace"), ("without", "identity"))
)
_ABLATIONS = (
    MOTE.but("MoTE, update spread (paper)"),
    Line("MoTE, no null space", "MoTE", {"metric": "identity"}),
    *(Line(f"MoTE, whitening {name}", "MoTE", {"whitening": name}) for name in ("none", "in", "out", "both")),
    BCD.but("MoEEdit-BCD, no null space", metric="identity"),
    BCD_SPEEDUP.but("BCD+speedup, no null space", metric="identity"),
    GLOBAL.but("Global, no null space", metric="identity"),
    GLOBAL.but("Global, forgetting earlier edits", remember_edits=False),
    GLOBAL.but("Global, no context prefixes", context_prefixes=[]),
    GLOBAL_SPEEDUP.but("Global+speedup, no null space", metric="identity"),
    *(Line(name, name) for name in ("MoE-ROME", "MoE-MEMIT", "MoE-AlphaEdit")),
)

TABLES: Mapping[str, PaperTable] = {
    table.name: table
    for table in (
        PaperTable("1", "all methods", _METHODS, ("code", "edits", *_SCORES), False, (COUNTERFACT, ZSRE)),
        PaperTable("2", "solvers and spreads", (*SOLVERS, *SPREADS), ("spread", *_SCORES, *_SECONDS)),
        PaperTable("4", "routing similarity", (*SOLVERS, *SPREADS), ("routing",)),
        PaperTable("5", "whitening", _WHITENING, (*_SCORES, "total s")),
        PaperTable("6", "null space", _NULL_SPACE, (*_SCORES, "total s")),
        PaperTable("ablations", "Ablations", _ABLATIONS, _SCORES, False),
    )
}
"""By name, in the paper's order."""


def find_tables(names: Sequence[str]) -> list[PaperTable]:
    """The tables by these names, each once.

    Raises:
        DataError: none is named, or one that there is not.
    """
    unknown = [name for name in names if name not in TABLES]
    if unknown or not names:
        hint = did_you_mean(unknown[0], TABLES) if unknown else ""
        found = f"There is no table {unknown[0]!r}.{hint}" if unknown else "Name at least one table."
        raise DataError(f"{found} There are {', '.join(TABLES)}.")
    return [TABLES[name] for name in dict.fromkeys(names)]


@dataclass(frozen=True)
class Figures:
    """A row as published; scores in percent."""

    efficacy: float
    generalisation: float
    specificity: float
    seconds: float


@dataclass(frozen=True)
class Published:
    """What the paper reports of a table for one model.

    Attributes:
        table: its name.
        model: as hparams files name it.
        hardware: on which its seconds were measured.
        figures: by the label of the row.
        edits, batch_size: of the data set.
        first: prompt and new answer of the data set's first record, by which it is known.
    """

    table: str
    model: str
    hardware: str
    figures: Mapping[str, Figures]
    edits: int = 1000
    batch_size: int = 50
    first: tuple[str, str] = ("The mother tongue of Danielle Darrieux is", "English")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _table_2(model: str, rows: Sequence[tuple[float, float, float, float]]) -> Published:
    labels = (line.label for line in (BCD, BCD_SPEEDUP, GLOBAL_SPEEDUP, MOTE))
    return Published("2", model, "H200", dict(zip(labels, (Figures(*row) for row in rows), strict=True)))


PUBLISHED = (
    _table_2("qwen3-30b-a3b", [
        (97.90, 86.50, 83.45, 477.0), (83.53, 69.80, 83.58, 104.6), (94.80, 69.65, 83.70, 81.6),
        (97.00, 82.60, 79.57, 76.8),
    ]),
    _table_2("gpt-oss-20b", [
        (96.90, 38.80, 80.93, 469.2), (89.5, 40.85, 81.73, 123.9), (89.3, 40.55, 81.74, 100.8),
        (94.60, 37.55, 81.85, 88.9),
    ]),
    _table_2("qwen3.6-35b-a3b", [
        (93.40, 78.55, 77.99, 717.4), (82.40, 53.75, 81.40, 208.0), (82.30, 54.35, 81.33, 121.0),
        (89.20, 68.44, 75.33, 112.5),
    ]),
)  # fmt: skip


def known_model(model_name: str) -> str | None:
    """Which of the papers' models this is, by its name and the architecture and sizes in its config; None otherwise."""
    name = short_name(model_name)
    return name if name in OUTLINES and config_outline(model_name) == OUTLINES[name] else None


def published_for(
    table: PaperTable, about: Mapping[str, Any], model: str | None, first: tuple[str, str]
) -> Published | None:
    """What was published of a table for the same model, data, number of edits and batch size; None otherwise.

    Args:
        table: that was made.
        about: provenance of the task.
        model: see `known_model`.
        first: prompt and new answer of the first record.
    """
    for found in PUBLISHED:
        wanted = (found.table, found.model, found.edits, found.batch_size, 0, COUNTERFACT, found.first)
        made = (table.name, model, about["edits"], about["batch_size"], about["skip"], about["protocol"], first)
        if wanted == made:
            return found
    return None
