"""The page of the documentation that is made from ``docs/robustness.json``: ``python -m benchmarks.robustness``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from benchmarks.robustness_artefacts import COUNTS, KINDS
from easyedit_moe.storage.files import write_text
from easyedit_moe.storage.strict_json import read_json

PAGE = Path(__file__).parents[1] / "docs" / "robustness.md"
SECTIONS = {
    "requests": "Requests of every kind of junk, handed to the editor",
    "hparams": "Hyper-parameters of every class, and their YAML files",
    "files": "Files of records and facts, of every layout",
    "command line": "Arguments of every command",
    "artefacts": "What the package wrote itself, changed afterwards",
    "artefact bytes": "The same files with bytes flipped, cut off, doubled or put in, up to three times",
    "interrupts": "Interrupts at every line of editing, patching and capturing",
}
"""Sections of the file in the order of the page, with what was tried."""
BITS = "a bit changed"


def page(counts: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [HEAD]
    for name, what in SECTIONS.items():
        found = counts.get(name)
        parts += [f"## {name.capitalize()}", f"{what}."]
        if found is None:
            parts.append("Not counted yet.")
            continue
        parts.append(artefact_tables(found["counts"]) if name == "artefacts" else counts_table(found))
        parts.append(f"Made by {commands(found['made by'])}.")
    return "\n\n".join(parts) + "\n"


def commands(made_by: str | Sequence[str]) -> str:
    """One command, or several whose counts were added."""
    return ", and ".join(f"`{one}`" for one in ([made_by] if isinstance(made_by, str) else made_by))


HEAD = """# Robustness

What was tried to break the package, and what came of it. The counts are those of `docs/robustness.json`, which the
commands below write; `python -m benchmarks.robustness` makes this page of it. "Raw" is an error that is none of ours,
"silent" or "changed" a result that is used though it is wrong, or something that is left behind: each must be 0."""


def artefact_tables(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """A table of outcomes by artefact, one of changed bits, and one by mutation."""
    texts = [ARTEFACTS]
    for chosen in (lambda kind: kind != BITS, lambda kind: kind == BITS):
        rows = [[name, *_sums(one for kind, one in found.items() if chosen(kind))] for name, found in counts.items()]
        texts.append(_table(("artefact", "tried", *KINDS), rows))
        texts.append(CHANGED_BITS)
    texts.pop()
    kinds = dict.fromkeys(kind for found in counts.values() for kind in found if kind != BITS)
    rows = [[kind, *_sums(found[kind] for found in counts.values() if kind in found)] for kind in kinds]
    return "\n\n".join([*texts, "The same contents by what was changed:", _table(("mutation", "tried", *KINDS), rows)])


ARTEFACTS = """Each file was written again with another content (a tensor or an entry of its metadata missing, renamed,
too many, of another dtype, shape or kind, not finite) and with digests of that content, so that its schema is what
refuses it. A cache is made anew, with a warning, unless it says that it is of something else; patches, adapters and
results are refused, and the model is as before. "As it was" are files whose content means the same: the provenance of a
patch is free, so is what lies beside the records of tune, and a target file of an earlier version lacks `known`."""
CHANGED_BITS = "One bit of a file changed, at places that are drawn over the whole of it, which its digests notice:"


def counts_table(found: Mapping[str, Any]) -> str:
    """Outcomes of a section that has nothing but counts."""
    counts = {kind: count for kind, count in found.items() if isinstance(count, int)}
    return _table(("tried", *counts), [[str(sum(counts.values())), *map(str, counts.values())]])


def _sums(found: Any) -> list[str]:
    total: Counter[str] = Counter()
    for one in found:
        total.update(one)
    return [str(total.total()), *(str(total[kind]) for kind in KINDS)]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def main() -> None:
    """Write the page."""
    write_text(PAGE, page(read_json(COUNTS)))


if __name__ == "__main__":
    typer.run(main)
