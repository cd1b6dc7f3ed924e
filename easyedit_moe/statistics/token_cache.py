"""Token ids of a corpus: made once, kept beside the statistics, and shared by layers, models and processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import DamagedCacheError
from easyedit_moe.facts.tokens import encode_text
from easyedit_moe.statistics.ahead import Ahead, made_ahead
from easyedit_moe.statistics.moments import ListedShards, encode_cut, shards_of
from easyedit_moe.storage.schema import Described, Expected, check_tensors, content_of, read_record
from easyedit_moe.storage.strict_json import digest
from easyedit_moe.storage.tensors import SCHEMA, check_key, read_or_warn, read_safetensors, write_safetensors

logger = logging.getLogger(__name__)

_ADVICE = "delete it, and the corpus is tokenised anew"
_PROBE = 'Zoë said, "It\'s 3.14";\n\ttwo  spaces, 東京, Москва.'
_EXPECTED = {
    "ids": Expected(("tokens",), (torch.int32,)),
    "lengths": Expected(("texts",), (torch.int64,)),
    "parts": Expected(("parts",), (torch.int64,)),
    "sizes": Expected(("parts",), (torch.int64,)),
}


@dataclass(frozen=True)
class TokenKey:
    """All that token ids depend on: hashes of the texts and of the tokenizer, and the length at which texts are cut."""

    corpus: str
    tokenizer: str
    max_length: int

    def file(self, stats_dir: str | Path) -> Path:
        """``<stats_dir>/tokens/<hash of the key>.safetensors``."""
        return Path(stats_dir) / "tokens" / f"{digest(asdict(self))[:16]}.safetensors"


def tokenizer_hash(tok: PreTrainedTokenizerBase, some_tokens: str) -> str:
    """Of its vocabulary, rules and special tokens; ``some_tokens`` stands for what it makes of a few texts."""
    backend = getattr(tok, "backend_tokenizer", None)
    rules = sorted(tok.get_vocab().items()) if backend is None else backend.to_str()
    return digest([type(tok).__name__, rules, str(tok.special_tokens_map), some_tokens])


def rules_hash(tok: PreTrainedTokenizerBase) -> str | None:
    """Of all that decides which tokens a text has, so that no text is needed to tell two tokenizers apart.

    None for a tokenizer whose rules are Python code, which can't be compared, or can't be written down or tried.
    """
    backend, kind = getattr(tok, "backend_tokenizer", None), type(tok)
    if backend is None or kind.__module__.partition(".")[0] != "transformers":
        return None
    try:
        rules = backend.to_str()
        if backend.truncation is not None or backend.padding is not None:  # left over from the last call; none here
            plain = type(backend).from_str(rules)
            plain.no_truncation()
            plain.no_padding()
            rules = plain.to_str()
        probe = encode_text(tok, _PROBE)
    except Exception as error:  # tokenizers raises no other type, as where a vocabulary has no word for the probe
        logger.debug("The rules of the tokenizer %s can't be told: %s", kind.__name__, error)
        return None
    splits = getattr(tok, "split_special_tokens", False)
    return digest([kind.__name__, rules, str(tok.special_tokens_map), splits, probe])


class TokenisedTexts:
    """A corpus of texts as `easyedit_moe.statistics.moments.Shards` of token ids.

    A part is read from the file where it is there, and else tokenised when its turn comes, or shortly before; `keep`
    writes the file.
    """

    def __init__(
        self,
        tok: PreTrainedTokenizerBase,
        texts: Sequence[str],
        key: TokenKey,
        file: Path,
        known: Sequence[Sequence[int]] = (),
    ) -> None:
        """``known`` are the ids of the first texts, where these were tokenised already."""
        self._tok, self._key, self._file = tok, key, file
        self._listed = ListedShards(shards_of(texts, key.max_length))
        self._texts = self._listed.parts
        self._found: dict[int, list[Tensor]] = read_or_warn(file, self._read) or {}
        self._ahead: Ahead[list[list[int]]] | None = None
        self.added = 0
        start = 0
        for number, some in enumerate(self._texts):
            if start + len(some) <= len(known) and number not in self._found:
                self._take(number, known[start : start + len(some)])
            start += len(some)

    @property
    def per_round(self) -> int:
        """As for every corpus of texts."""
        return self._listed.per_round

    def __len__(self) -> int:
        """How many parts there are."""
        return len(self._texts)

    def part(self, number: int) -> list[list[int]]:
        """Ids of the texts of one part, each cut at the key's length."""
        if number not in self._found:
            self._take(number, self._encoded(number) if self._ahead is None else self._ahead.result(number))
        return [ids.tolist() for ids in self._found[number]]

    @contextmanager
    def ahead(self, numbers: Sequence[int]) -> Iterator[None]:
        """Inside, parts are asked for in this order, and a few are tokenised in a thread before it is their turn.

        What is tokenised in vain, because it is never asked for, is not kept.
        """
        missing = [number for number in numbers if number not in self._found]
        if not missing:
            yield
            return
        with made_ahead(self._encoded, missing) as made:
            self._ahead = made
            try:
                yield
            finally:
                self._ahead = None

    def _encoded(self, number: int) -> list[list[int]]:
        return [encode_cut(self._tok, text, self._key.max_length) for text in self._texts[number]]

    def keep(self) -> None:
        """Write what is there, if any of it is new.

        Raises:
            WriteError: it can't be written.
        """
        if not self.added:
            return
        numbers = sorted(self._found)
        every = [ids for number in numbers for ids in self._found[number]]
        tensors = {
            "ids": torch.cat(every),
            "lengths": torch.tensor([len(ids) for ids in every]),
            "parts": torch.tensor(numbers),
            "sizes": torch.tensor([len(self._found[number]) for number in numbers]),
        }
        write_safetensors(self._file, tensors, {"schema": SCHEMA, "kind": "tokens", "key": asdict(self._key)})
        self.added = 0

    def _take(self, number: int, texts: Sequence[Sequence[int]]) -> None:
        self._found[number] = [torch.tensor(list(ids), dtype=torch.int32) for ids in texts]
        self.added += 1

    def _read(self, path: Path) -> dict[int, list[Tensor]]:
        """The parts in a file.

        Raises:
            DamagedCacheError: truncated or corrupt, or not these texts' tokens. CacheError: of another key.
        """
        tensors, metadata = read_safetensors(path, DamagedCacheError, _ADVICE)
        check_key(path, metadata, "tokens", "file of tokens", asdict(self._key), _ADVICE)
        with content_of(path, DamagedCacheError, _ADVICE):
            read_record(metadata, Described)
            check_tensors(tensors, _EXPECTED)
            ids, lengths, parts, sizes = (tensors[name] for name in _EXPECTED)
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(self._tok):
                raise ValueError("its ids are not the tokenizer's")
            if int(lengths.sum()) != len(ids) or bool((lengths < 0).any()):
                raise ValueError("its texts are not as long as their ids")
            texts = list(ids.split(lengths.tolist()))
            found, start = {}, 0
            for number, size in zip(parts.tolist(), sizes.tolist(), strict=True):
                if not 0 <= number < len(self._texts) or size != len(self._texts[number]):
                    raise ValueError("its parts are not those of the corpus")
                found[number] = texts[start : start + size]
                start += size
            if start != len(texts) or any(len(one) > self._key.max_length for one in texts):
                raise ValueError("its texts are not those of the corpus")
        return found
