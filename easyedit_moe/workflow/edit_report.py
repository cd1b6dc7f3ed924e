"""An edit's report as files: report.json for programs, report.md for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from easyedit_moe.storage.files import write_text
from easyedit_moe.storage.strict_json import write_json
from easyedit_moe.workflow.edit_outcome import Change, EditReport, FactReport

COLUMNS = ("fact", "before", "after", "probability", "rephrasings", "neighbours kept")
"""Of the table of facts; the same on the terminal and in report.md."""
SHOWN = 80
"""Characters of a text in a table."""


def counted(number: int, noun: str) -> str:
    """Such as "1 fact" or "2 facts"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def cells(fact: FactReport, whole: bool = False) -> list[str]:
    """One fact as a line of the table, its texts whole or cut where they are long."""
    change = fact.change
    cut = str if whole else short
    return [
        f"{cut(change.prompt)} -> {cut(change.wanted)}",
        cut(change.before.answer),
        cut(change.after.answer),
        f"{change.before.probability:.3f} -> {change.after.probability:.3f}",
        _mean_of(fact.rephrasings),
        _kept(fact.neighbours),
    ]


def summary(report: EditReport) -> str:
    """The figures of all facts in one line."""
    count = len(report.facts)
    neighbours = [change for fact in report.facts for change in fact.neighbours]
    parts = [
        f"{counted(count, 'fact')} edited",
        f"{counted(report.changed, 'answer')} changed",
        f"new target written by {report.written}",
    ]
    if neighbours:
        kept = sum(not change.changed for change in neighbours)
        parts.append(f"{kept} of {counted(len(neighbours), 'neighbour')} kept the answer")
    if report.refused:
        parts.append(f"{counted(len(report.refused), 'fact')} refused")
    return ", ".join(parts) + "."


def to_dict(report: EditReport) -> dict[str, Any]:
    """Content of report.json (schema 1); see `EditReport` and `FactReport` for the fields."""
    facts = [
        {**asdict(fact), "changed": fact.change.changed, "written": fact.change.after.first_choice}
        for fact in report.facts
    ]
    return {
        "schema": 1,
        "facts": facts,
        "refused": [asdict(one) for one in report.refused],
        "unit": report.unit,
        "changed": report.changed,
        "written": report.written,
        "warnings": list(report.warnings),
        "seconds": report.seconds,
        "patch_id": report.patch_id,
        "provenance": report.provenance,
    }


def markdown(report: EditReport) -> str:
    """Content of report.md."""
    made = report.provenance
    lines = [
        f"# {made['method']} on {made['model']}",
        "",
        summary(report),
        "",
        "Answers are greedy. The probability is that of the whole new target after the prompt, teacher-forced; on "
        "rephrasings its mean, before -> after. An answer counts as changed, and that of a neighbour as kept, by as "
        "many of its tokens as the wanted answer has.",
        "",
        *_table(COLUMNS, [cells(fact, whole=True) for fact in report.facts]),
        "",
    ]
    if report.refused:
        rows = [[f"{report.unit} {one.number}", one.reason] for one in report.refused]
        lines += ["## Refused", "", *_table(("where", "why"), rows), ""]
    if report.warnings:
        lines += ["## Warnings", "", *[f"- {_plain(text)}" for text in report.warnings], ""]
    lines += ["## Facts", ""]
    for fact in report.facts:
        lines += [*_fact(fact, report.unit), ""]
    settings = ", ".join(f"{name} {value}" for name, value in made["hparams"].items())
    lines += ["## Made by", "", f"Patch {report.patch_id}. {_plain(settings)}.", ""]
    return "\n".join(lines)


def write_report(report: EditReport, folder: Path) -> list[Path]:
    """Write both files; each in full or not at all."""
    path = write_text(folder / "report.md", markdown(report))
    return [write_json(folder / "report.json", to_dict(report)), path]


def short(text: str) -> str:
    """A text in one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"


def _fact(fact: FactReport, unit: str) -> list[str]:
    told = [f"batch {fact.batch}"]
    if fact.target_nll is not None:
        told.append(f"target NLL {fact.target_nll:.3f}{'' if fact.reached else ', not reached'}")
    if fact.residual_share is not None:
        told.append(f"residual reached {fact.residual_share:.0%}")
    lines = [f"### {unit} {fact.number}: {_plain(fact.request.prompt)}", "", ", ".join(told) + ".", ""]
    kinds = {"fact": (fact.change,), "rephrasing": fact.rephrasings, "neighbour": fact.neighbours,
             "portability": fact.portability}  # fmt: skip
    rows = [
        [kind, change.prompt, change.wanted, *_both(change)] for kind, changes in kinds.items() for change in changes
    ]
    return [*lines, *_table(("kind", "prompt", "wanted", "before", "after", "probability"), rows)]


def _both(change: Change) -> list[str]:
    return [
        change.before.answer,
        change.after.answer,
        f"{change.before.probability:.3f} -> {change.after.probability:.3f}",
    ]


def _mean_of(changes: Sequence[Change]) -> str:
    if not changes:
        return "-"
    before = sum(change.before.probability for change in changes) / len(changes)
    after = sum(change.after.probability for change in changes) / len(changes)
    return f"{before:.3f} -> {after:.3f}"


def _kept(changes: Sequence[Change]) -> str:
    return f"{sum(not change.changed for change in changes)} of {len(changes)}" if changes else "-"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as Markdown, whole: a file has room for every text."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows]


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is, in one line."""
    line = " ".join(str(text).split())
    for mark in "\\|*_`<>[]#":
        line = line.replace(mark, "\\" + mark)
    return line
