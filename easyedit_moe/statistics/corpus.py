"""Texts for statistics: from files, a folder of them, a list, a ``datasets`` dataset or the bundled corpus."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from easyedit_moe import factworld
from easyedit_moe.errors import DataError, HubError, shown
from easyedit_moe.facts.iterating import is_iterable
from easyedit_moe.facts.texts import check_encodable
from easyedit_moe.statistics.named_datasets import dataset_revision, dataset_rows, named_dataset
from easyedit_moe.storage.files import is_file, is_folder
from easyedit_moe.storage.strict_json import digest, parse_json

logger = logging.getLogger(__name__)

TEXT_COLUMN = "text"
GENERATED = "generated"
"""As a corpus: the model's own samples."""
FOLDER_SUFFIXES = (".txt", ".text", ".md", ".jsonl", ".json", ".parquet")
"""Files that are read of a folder."""


def load_texts(source: str | Path | Iterable[Any], n_samples: int | None = None) -> list[str]:
    """At most ``n_samples`` non-empty texts.

    ``source`` is "factworld" (the bundled corpus), a file (``.jsonl`` or ``.json``: records with a "text" field or
    strings; ``.parquet``: a column "text"; any other: one text a line), a folder of such files (taken in the order of
    their paths, subfolders too; see `FOLDER_SUFFIXES`), an iterable of strings or of records with a "text" field (a
    ``datasets`` dataset is one), or the name of a dataset that ``datasets.load_dataset`` knows, which is streamed.

    Raises:
        DataError: missing file, wrong layout, an unknown dataset, no text at all, or "generated", which needs a model
            (see `easyedit_moe.statistics.generated.corpus_texts`).
    """
    with closing(iterate_texts(source)) as found:
        texts = list(islice(found, n_samples))
    if not texts:
        raise DataError(f"{_called(source)} holds no text; statistics need at least one.")
    return texts


def iterate_texts(source: str | Path | Iterable[Any]) -> Generator[str]:
    """As `load_texts`, one text after the other; of files and datasets no more is read than is taken.

    Raises:
        DataError: see there; of a source that can be seen to be wrong at once, else when its turn comes.
    """
    name = _called(source)
    if isinstance(source, (str, Path)):
        return _opened(_named(name), name)
    if isinstance(source, Mapping) or not is_iterable(source):
        raise DataError(f"{name}: expected a list of texts or records; found {type(source).__name__}.")
    return _texts(source, name)


def _opened(items: Generator[Any], name: str) -> Generator[str]:
    """Texts of what was opened here, which is closed with them: left to the collector, an interrupt there is lost."""
    with closing(items):
        yield from _texts(items, name)


def _texts(items: Iterable[Any], name: str) -> Generator[str]:
    for item in items:
        text = _text(item, name)
        if text.strip():
            yield text


def source_stamp(source: str | Path) -> tuple[Any, ...] | None:
    """What changes when the files of a corpus do: path, inode, size and times of each; None for what is not files."""
    if source == GENERATED:
        return None
    path = _path_of(str(source))
    if is_folder(path):
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in FOLDER_SUFFIXES and is_file(file))
    else:
        files = [path] if is_file(path) else []
    # Of a link both names count: the one that is given says how the file is read.
    states = [(_readable(file.absolute()), _readable(file.resolve()), file.stat()) for file in files]
    return tuple((*names, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for *names, s in states) or None


@dataclass(frozen=True)
class Origin:
    """Where texts come from, and what changes when they do.

    Attributes:
        place: of files their path; of a dataset by name its path, configuration and split.
        state: hash of `source_stamp`, or the dataset's revision; None where the hub could not be asked for it.
        reason: why it could not be asked.
        files: whether it is files, whose state is of the very bits that are read; of a dataset, what is read may be
            another revision than the hub's, as where ``datasets`` falls back on what it has.
    """

    place: tuple[str, ...]
    state: str | None
    reason: str = ""
    files: bool = False


def origin_of(source: str) -> Origin | None:
    """What is known of a corpus without reading it; a dataset by name asks the hub for its revision.

    None where nothing tells whether the texts are still the same: samples, what is not there, and datasets that the hub
    does not know.
    """
    stamp = source_stamp(source)
    if stamp is not None:
        # A path may hold bytes that no text does.
        return Origin((_readable(_path_of(source).absolute()),), digest(stamp), files=True)
    if source == GENERATED or is_folder(_path_of(source)) or _is_path(source):
        return None
    dataset = named_dataset(source)
    try:
        revision = dataset_revision(dataset)
    except HubError as error:
        return Origin(dataset.place, None, str(error))
    return None if revision is None else Origin(dataset.place, revision)


def corpus_hash(texts: list[str]) -> str:
    """SHA-256 over all texts, in hexadecimal."""
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode("utf-8") + b"\0")
    return found.hexdigest()


def _path_of(name: str) -> Path:
    return factworld.data_path("corpus.txt") if name == factworld.MODEL_NAME else Path(name)


def _readable(path: Path) -> str:
    """A path as a text that can be written as UTF-8, another one for each path."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _is_path(name: str) -> bool:
    """Whether a name can only be meant as a path, so that no dataset is called so."""
    return bool(Path(name).suffix) or Path(name).is_absolute() or name.startswith(".")


def _called(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else "the given corpus"


def _named(name: str) -> Generator[Any]:
    if name == GENERATED:
        raise DataError(
            f"{GENERATED!r} means texts that a model samples, and there is no model here; give a file, a folder or the "
            f"name of a dataset (a file of that name is ./{GENERATED})."
        )
    path = _path_of(name)
    if is_file(path):
        return _file(path)
    if is_folder(path):
        return _folder(path)
    if _is_path(name):
        raise DataError(f"The corpus {name} does not exist, neither as a file nor as a folder.")
    return dataset_rows(name)


def _folder(folder: Path) -> Generator[Any]:
    inside = (path for path in sorted(folder.rglob("*")) if os.path.isfile(path))
    shown = [path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    files = [path for path in shown if path.suffix.lower() in FOLDER_SUFFIXES]
    if not files:
        raise DataError(f"The folder {folder} holds no corpus: no file ends in {', '.join(FOLDER_SUFFIXES)}.")
    if len(files) < len(shown):
        left_out = next(path for path in shown if path not in files)
        logger.info(
            "Of %d files in %s, %d are read; left out are such as %s.", len(shown), folder, len(files), left_out
        )
    return _files(files)


def _files(files: Iterable[Path]) -> Generator[Any]:
    for path in files:
        yield from _file(path)


def _file(path: Path) -> Generator[Any]:
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            yield from _parquet(path)
        elif kind == ".json":
            items = parse_json(path.read_text(encoding="utf-8"))
            if not isinstance(items, list):
                raise DataError(f"{path} must hold a list of texts or records; found {type(items).__name__}.")
            yield from items
        else:
            with path.open(encoding="utf-8") as lines:  # not splitlines(): a JSON string may hold U+2028 and the like
                for line in lines:
                    if line.strip():
                        yield parse_json(line) if kind == ".jsonl" else line.rstrip("\n")
    except (ValueError, OSError) as error:
        raise DataError(f"{path} can't be read as {path.suffix or 'UTF-8 text'}: {error}") from error


def _parquet(path: Path) -> Generator[str]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"Reading {path} needs `pip install pyarrow`.") from error
    with parquet.ParquetFile(path) as file:
        if TEXT_COLUMN not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise DataError(f"{path} has no column '{TEXT_COLUMN}'; found {names}.")
        for batch in file.iter_batches(batch_size=1024, columns=[TEXT_COLUMN]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _text(item: Any, name: str) -> str:
    text = item.get(TEXT_COLUMN) if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise DataError(f"{name}: expected strings or records with a '{TEXT_COLUMN}' field; found {shown(item)}.")
    check_encodable(name, text, DataError)
    return text
