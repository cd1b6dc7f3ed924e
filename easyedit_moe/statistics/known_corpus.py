"""What was found of a corpus, kept on disk: its hash, its number of texts, the hash of the tokens of the first ones.

A record is used only while the files, or the dataset's revision, are those of which it is: then no text is read again
to find what is cached for the corpus.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import CorpusNotComparedWarning, DamagedCacheError, DataError, WriteError
from easyedit_moe.facts.tokens import encode_text
from easyedit_moe.statistics.corpus import corpus_hash, iterate_texts, load_texts, origin_of
from easyedit_moe.statistics.moments import encode_cut
from easyedit_moe.statistics.token_cache import rules_hash
from easyedit_moe.storage.files import is_file
from easyedit_moe.storage.schema import Described, content_of, read_record
from easyedit_moe.storage.strict_json import digest, read_checked_json, write_checked_json
from easyedit_moe.storage.tensors import SCHEMA, check_key, read_or_warn

logger = logging.getLogger(__name__)

READING = 1
"""Raised whenever texts are read, tokenised or hashed in another way, so that no record of before is used."""
_FIRST_TEXTS = 8
_ADVICE = "delete it, and the corpus is read anew"


@dataclass(frozen=True)
class CorpusBounds:
    """How much of a source is read: ``n_samples`` texts at most, and of these as many as have ``n_tokens`` tokens
    (None: all) where each is cut at ``max_length``.
    """

    n_samples: int
    n_tokens: int | None
    max_length: int


@dataclass(frozen=True)
class _TextsKey:
    place: tuple[str, ...]
    n_samples: int
    n_tokens: int | None
    tokenizer: str | None
    max_length: int | None
    reading: int = READING


@dataclass(frozen=True)
class _TextsRecord(Described):
    state: str
    corpus: str
    count: int


@dataclass(frozen=True)
class _TokensKey:
    corpus: str
    texts: int
    tokenizer: str
    reading: int = READING


@dataclass(frozen=True)
class _TokensRecord(Described):
    tokens: str


_FOUND: dict[tuple[_TextsKey, str | None], tuple[str, int]] = {}
"""Hash and number of the texts that this process read in a source's state, for where no record can be written."""


class KnownCorpus:
    """The texts of a source, which are read when `texts` is called, and before only if no record holds.

    Attributes:
        name: hash of all its texts.
        count: how many they are.
        tokens: hash of what the tokenizer makes of the first few.
        known: token ids of the first texts, where these were tokenised to count them.
    """

    def __init__(self, tok: PreTrainedTokenizerBase, source: str, bounds: CorpusBounds, stats_dir: str | Path) -> None:
        """Find the corpus, by its record under ``stats_dir`` or by reading it; then a record is written.

        Warns `CorpusNotComparedWarning` where the hub can't be asked whether a dataset is still the same.

        Raises:
            DataError: it can't be read. CacheError: its record is another corpus's.
        """
        self._source, self._bounds, self._folder = source, bounds, Path(stats_dir) / "corpora"
        self._origin, self._rules = origin_of(source), rules_hash(tok)
        self._texts: list[str] | None = None
        self.known: list[list[int]] = []
        self.name, self.count = self._recorded() or self._read(tok)
        self.tokens = self._hash_of_tokens(tok)

    def texts(self) -> list[str]:
        """All of them.

        Raises:
            DataError: they can't be read, or are no longer those that were found.
        """
        if self._texts is None:
            self._texts = self._read_again(self.count)
        return self._texts

    def _texts_key(self) -> _TextsKey | None:
        """None where nothing says that a record still holds."""
        bounds, budget = self._bounds, self._bounds.n_tokens is not None
        if self._origin is None or (budget and self._rules is None):
            return None
        tokenizer, cut = (self._rules, bounds.max_length) if budget else (None, None)
        return _TextsKey(self._origin.place, bounds.n_samples, bounds.n_tokens, tokenizer, cut)

    def _recorded(self) -> tuple[str, int] | None:
        """Hash and number of the texts, if a record holds."""
        key = self._texts_key()
        if key is None or self._origin is None:
            return None
        path = self._file("texts", key)
        if (key, self._origin.state) in _FOUND and not is_file(path):
            return _FOUND[key, self._origin.state]
        record = read_or_warn(path, partial(_record_in, key=key, kind="corpus", record=_TextsRecord))
        if record is None or (self._origin.state is not None and record.state != self._origin.state):
            return None
        if self._origin.state is None:
            warnings.warn(
                f"{self._origin.reason} What was found of its revision {record.state} is used for {self._source!r}, "
                f"though it may have changed; to have it read anew, delete {path}.",
                CorpusNotComparedWarning,
                stacklevel=2,
            )
        return record.corpus, record.count

    def _read(self, tok: PreTrainedTokenizerBase) -> tuple[str, int]:
        """Hash and number of the texts, by reading them."""
        bounds, key = self._bounds, self._texts_key()
        if bounds.n_tokens is None:
            texts = load_texts(self._source, bounds.n_samples)
        else:
            with closing(iterate_texts(self._source)) as found:
                some = islice(found, bounds.n_samples)
                texts = load_texts(_up_to(bounds.n_tokens, some, tok, bounds.max_length, self.known))
        self._texts, name = texts, corpus_hash(texts)
        if key is not None and self._is_as_found():
            state = None if self._origin is None else self._origin.state
            if not self._keep("texts", key, "corpus", {"state": state, "corpus": name, "count": len(texts)}):
                _FOUND[key, state] = name, len(texts)
        return name, len(texts)

    def _read_again(self, count: int) -> list[str]:
        """The first texts, at least ``count``, of a corpus that was found by its record."""
        texts = load_texts(self._source, count)
        if self._origin is not None and self._origin.files and self._is_as_found():
            return texts
        texts = texts if count == self.count else load_texts(self._source, self.count)
        if corpus_hash(texts) != self.name:
            raise DataError(
                f"The corpus {self._source} holds other texts than when it was found a moment ago: it changed, or the "
                "hub did not say that it had. Start again, and it is read anew."
            )
        return texts

    def _is_as_found(self) -> bool:
        """Whether the source is surely in the state that it was in before it was read."""
        return self._origin is not None and self._origin.state is not None and origin_of(self._source) == self._origin

    def _hash_of_tokens(self, tok: PreTrainedTokenizerBase) -> str:
        """Another tokenizer, or other special tokens, shows on the first few texts already."""
        number = min(_FIRST_TEXTS, self.count)
        key = None if self._rules is None else _TokensKey(self.name, number, self._rules)
        if key is not None:
            read = partial(_record_in, key=key, kind="corpus tokens", record=_TokensRecord)
            record = read_or_warn(self._file("tokens", key), read)
            if record is not None:
                return record.tokens
        texts = self._read_again(number) if self._texts is None else self._texts
        tokens = corpus_hash([str(encode_text(tok, text)) for text in texts[:number]])
        if key is not None:
            self._keep("tokens", key, "corpus tokens", {"tokens": tokens})
        return tokens

    def _file(self, kind: str, key: _TextsKey | _TokensKey) -> Path:
        return self._folder / f"{kind}-{digest(asdict(key))[:16]}.json"

    def _keep(self, name: str, key: _TextsKey | _TokensKey, kind: str, content: Mapping[str, Any]) -> bool:
        """Write a record; False where that can't be done: the next process reads the corpus again. The log says so."""
        try:
            record = {"schema": SCHEMA, "kind": kind, "key": asdict(key), **content}
            write_checked_json(self._file(name, key), record)
        except WriteError as error:
            logger.info("What was found of the corpus %s is not kept: %s", self._source, error)
            return False
        return True


def _record_in(path: Path, key: Any, kind: str, record: type[Any]) -> Any:
    """The record in a file.

    Raises:
        DamagedCacheError: cut off, or not what was written. CacheError: of another key.
    """
    content = read_checked_json(path, DamagedCacheError, _ADVICE)
    check_key(path, content, kind, "record of a corpus", asdict(key), _ADVICE)
    with content_of(path, DamagedCacheError, _ADVICE):
        return read_record(content, record)


def _up_to(
    n_tokens: int, texts: Iterable[str], tok: PreTrainedTokenizerBase, cut: int, known: list[list[int]]
) -> Iterator[str]:
    """Texts until they have that many tokens; their ids are added to ``known``."""
    for text in texts:
        yield text
        known.append(encode_cut(tok, text, cut))
        n_tokens -= len(known[-1])
        if n_tokens <= 0:
            return
