"""Files with another content than was written: each is refused by an error of ours, or made anew; none is used.

``python -m benchmarks.robustness_artefacts`` merges its counts into ``docs/robustness.json`` as the section
"artefacts"; the tests do the same with fewer bytes.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from benchmarks.artefacts import CACHE, Artefact, artefacts, state
from benchmarks.mutations import of_bytes, of_json, of_tensors
from easyedit_moe.errors import CacheError, EditingError, EditingWarning
from easyedit_moe.storage.strict_json import read_json, write_checked_json, write_json
from easyedit_moe.storage.tensors import read_safetensors, write_safetensors

COUNTS = Path(__file__).parents[1] / "docs" / "robustness.json"
REFUSED, RECOMPUTED, SAME, RAW, SILENT = "refused", "recomputed", "as it was", "raw", "silent"
KINDS = (REFUSED, RECOMPUTED, SAME, RAW, SILENT)
"""What comes of one file: an error of ours; made anew, with a warning and the same result; the same result without
(white space at the end of a header, say); another error; or another result, or a model that was changed."""
BYTES = 300


def counts_of(folder: Path, count: int, every: int = 1) -> tuple[dict[str, dict[str, Counter[str]]], list[str]]:
    """Outcomes by artefact and mutation, ``count`` changed bits among them; and what was bad, in words.

    With ``every`` only each so-manieth file is tried, the first of a mutation always.
    """
    counts: dict[str, dict[str, Counter[str]]] = {}
    bad: list[str] = []
    for artefact in artefacts(folder):
        found = counts.setdefault(artefact.name, {})
        for kind, outcome, detail in outcomes(artefact, count, every):
            found.setdefault(kind, Counter())[outcome] += 1
            if outcome in (RAW, SILENT):
                bad.append(f"{artefact.name}, {kind}: {detail}")
    return counts, bad


def outcomes(artefact: Artefact, count: int, every: int = 1) -> Iterator[tuple[str, str, str]]:
    """Mutation, outcome and detail of every file that is tried."""
    whole, wanted = artefact.path.read_bytes(), artefact.use()
    before = None if artefact.model is None else state(artefact.model)
    seen: set[str] = set()
    for i, kind in enumerate(files(artefact, whole, count)):
        if i % every and kind in seen:
            continue
        seen.add(kind)
        outcome, detail = _outcome(artefact, wanted)
        if artefact.model is not None and state(artefact.model) != before:
            outcome, detail = SILENT, "the model was changed"
        yield kind, outcome, detail
        artefact.path.write_bytes(whole)


def files(artefact: Artefact, whole: bytes, count: int) -> Iterator[str]:
    """Writes one file after the other, digests of the content as it is then included, and names the mutation."""
    if artefact.path.suffix == ".json":
        content = json.loads(whole)
        content.pop("digest")
        for kind, changed in of_json(content, artefact.nullable):
            write_checked_json(artefact.path, changed)
            yield kind
    else:
        tensors, metadata = read_safetensors(artefact.path, CacheError, "")
        for kind, other in of_tensors(tensors):
            write_safetensors(artefact.path, other, metadata)
            yield kind
        for kind, changed in of_json(metadata, artefact.nullable):
            write_safetensors(artefact.path, tensors, changed)
            yield kind
    for kind, data in of_bytes(whole, count):
        artefact.path.write_bytes(data)
        yield kind


def _outcome(artefact: Artefact, wanted: str) -> tuple[str, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = artefact.use()
        except EditingError as error:
            return REFUSED, str(error)
        except Exception as error:
            return RAW, f"{type(error).__name__}: {error}"
    anew = any(issubclass(one.category, EditingWarning) and "made anew" in str(one.message) for one in caught)
    if anew and artefact.kind == CACHE and found in (wanted, "from the beginning"):
        return RECOMPUTED, ""
    return (SAME, "") if found == wanted else (SILENT, "another result")


def section(count: int) -> dict[str, Any]:
    """The section of ``docs/robustness.json``."""
    with TemporaryDirectory() as folder:
        counts, bad = counts_of(Path(folder), count)
    return {
        "counts": {name: {kind: dict(one) for kind, one in found.items()} for name, found in counts.items()},
        "bad": bad[:20],
        "made by": f"python -m benchmarks.robustness_artefacts --bytes {count}",
    }


def main(
    count: Annotated[int, typer.Option("--bytes", help="Bits that are changed in each file.")] = BYTES,
    out: Annotated[Path, typer.Option(help="JSON file that gets the counts, beside those of other sections.")] = COUNTS,
) -> None:
    """Change every artefact in every way, and merge the counts of what came of it into a file."""
    kept = read_json(out) if out.is_file() else {}
    write_json(out, {**kept, "artefacts": section(count)})


if __name__ == "__main__":
    typer.run(main)
