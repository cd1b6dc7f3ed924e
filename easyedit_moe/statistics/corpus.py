"""Texts for statistics: from a file, a list, a ``datasets`` dataset or the bundled corpus."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from easyedit_moe import factworld
from easyedit_moe.errors import DataError

TEXT_COLUMN = "text"


def load_texts(source: str | Path | Iterable[Any], n_samples: int | None = None) -> list[str]:
    """At most ``n_samples`` non-empty texts.

    ``source`` is "factworld" (the bundled corpus), a file (``.jsonl`` or ``.json``: records with a "text" field or
    strings; any other: one text a line), an iterable of strings or of records with a "text" field (a ``datasets``
    dataset is one), or the name of a dataset that ``datasets.load_dataset`` knows.

    Raises:
        DataError: missing file, wrong layout, an unknown dataset, or no text at all.
    """
    if isinstance(source, (str, Path)):
        name = str(source)
        items = _named(name)
    else:
        name, items = "the given corpus", source
        if isinstance(source, Mapping) or not isinstance(source, Iterable):
            raise DataError(f"{name}: expected a list of texts or records; found {type(source).__name__}.")
    texts = (_text(item, name) for item in items)
    chosen = list(islice((t for t in texts if t.strip()), n_samples))
    if not chosen:
        raise DataError(f"{name} holds no text; statistics need at least one.")
    return chosen


def corpus_hash(texts: list[str]) -> str:
    """SHA-256 over all texts, in hexadecimal."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8") + b"\0")
    return digest.hexdigest()


def _named(name: str) -> Iterable[Any]:
    path = factworld.data_path("corpus.txt") if name == factworld.MODEL_NAME else Path(name)
    if path.is_file():
        return _file(path)
    if path.suffix or path.is_absolute() or name.startswith("."):
        raise DataError(f"The corpus file {name} does not exist.")
    return _hub_dataset(name)


def _file(path: Path) -> Iterable[Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            # Not splitlines(): a JSON string may hold U+2028 and the like.
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        if path.suffix == ".json":
            items = json.loads(text)
            if not isinstance(items, list):
                raise DataError(f"{path} must hold a list of texts or records; found {type(items).__name__}.")
            return items
    except ValueError as error:
        raise DataError(f"{path} can't be read as {path.suffix or 'UTF-8 text'}: {error}") from error
    return text.splitlines()


def _hub_dataset(name: str) -> Iterable[Any]:
    aliases = {
        "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
        "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    }
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"mom2_dataset {name!r} is not a file, and reading it by name needs `pip install datasets`."
        ) from error
    path, config = aliases.get(name, (name, None))
    try:
        yield from load_dataset(path, config, split="train", streaming=True)
    except Exception as error:  # datasets raises many types here, from connection errors to its own
        raise DataError(
            f"mom2_dataset {name!r} is neither a file nor a dataset that could be loaded "
            f"({type(error).__name__}: {error}). Give the path of a text file instead."
        ) from error


def _text(item: Any, name: str) -> str:
    text = item.get(TEXT_COLUMN) if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise DataError(f"{name}: expected strings or records with a '{TEXT_COLUMN}' field; found {str(item)[:80]!r}.")
    return text
