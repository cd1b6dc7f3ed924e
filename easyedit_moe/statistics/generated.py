"""A corpus that needs no download: texts that the model itself samples, at temperature 1.

They are sampled a part at a time, when statistics come to it, and kept on disk under a key of model and settings.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import DamagedCacheError, DataError, HyperParamsError
from easyedit_moe.facts.tokens import decode, encode_text, pad_id
from easyedit_moe.moe.capture import inference_mode_of, model_device
from easyedit_moe.statistics.corpus import GENERATED, load_texts
from easyedit_moe.storage.schema import content_of, read_record
from easyedit_moe.storage.strict_json import digest, read_checked_json, write_checked_json
from easyedit_moe.storage.tensors import SCHEMA, check_key, read_or_warn

PART_TEXTS = 64
"""Texts that are sampled at once."""
ROUND_PARTS = 4
"""Parts between two looks at the coverage."""
SAMPLED_TOKENS = 128
"""Tokens of a sampled text where no setting says so."""
OPENINGS = (
    "The", "In", "A", "It", "This", "He", "She", "They", "We", "I", "When", "For", "On", "What", "How", "If", "As",
    "There", "One", "After", "At", "But", "To", "Many", "New", "With", "From", "While", "Once", "You", "Some", "By",
)  # fmt: skip
"""What samples begin with where the tokenizer has no token for the beginning of a text; of each its first token."""
_ADVICE = "delete it, and it is sampled anew"


@dataclass(frozen=True)
class GenerationKey:
    """All that sampled texts depend on.

    Attributes:
        fingerprint: of the model.
        openings: token ids that samples begin with, by turns.
        length: tokens of a text at most, its opening among them.
        seed: of the draws.
        part_texts: texts that were sampled at once.
    """

    fingerprint: str
    openings: tuple[tuple[int, ...], ...]
    length: int
    seed: int
    part_texts: int = PART_TEXTS

    def __post_init__(self) -> None:
        longest = max(map(len, self.openings))
        if longest >= self.length:
            raise HyperParamsError(
                f"generated_length must leave room behind the openings, of which one has {longest} tokens; found "
                f"{self.length}. Raise it (and max_length, which bounds it), or give shorter generated_openings."
            )

    def folder_name(self) -> str:
        """``generated-<hash of the key>``."""
        return f"generated-{digest(asdict(self))[:16]}"


@dataclass(frozen=True)
class _Part:
    schema: int
    kind: str
    key: dict[str, Any]
    ids: list[list[int]]
    texts: list[str]


class GeneratedTexts:
    """Samples of a model in parts of `PART_TEXTS`; a part is the same whichever was made before it, on one machine.

    Args:
        model: that samples; any causal language model of transformers.
        tok: its tokenizer.
        key: what is sampled.
        n_samples: how many texts there are.
        folder: where parts are kept and found again; None keeps none.
    """

    def __init__(
        self, model: nn.Module, tok: PreTrainedTokenizerBase, key: GenerationKey, n_samples: int, folder: Path | None
    ) -> None:
        self.model, self.tok, self.key, self.n_samples = model, tok, key, n_samples
        self.folder = None if folder is None else folder / key.folder_name()

    per_round = ROUND_PARTS

    def __len__(self) -> int:
        """How many parts."""
        return -(-self.n_samples // self.key.part_texts)

    def part(self, number: int) -> list[list[int]]:
        """Token ids of the texts of one part, without what ends a text.

        Raises:
            CacheError: a file of something else; one that is damaged is made anew, with a warning. WriteError: the part
                can't be kept.
        """
        count = min(self.key.part_texts, self.n_samples - number * self.key.part_texts)
        path = None if self.folder is None else self.folder / f"part-{number:05d}.json"
        read = None if path is None else read_or_warn(path, lambda file: self._read(file, number))
        if read is not None:
            return read[:count]
        ids = self._sample(number)
        if path is not None:
            texts = [decode(self.tok, row) for row in ids]
            content = {"schema": SCHEMA, "kind": "generated texts", "key": self._part_key(number)}
            write_checked_json(path, {**content, "ids": ids, "texts": texts}, indent=None)
        return ids[:count]

    def ahead(self, numbers: Sequence[int]) -> AbstractContextManager[None]:
        """Nothing is made before its turn: the model that samples is busy."""
        return nullcontext()

    def texts(self) -> list[str]:
        """All of them as text, without special tokens; those that are blank are left out."""
        parts = (self.part(number) for number in range(len(self)))
        texts = (decode(self.tok, row, skip_special_tokens=True) for part in parts for row in part)
        return [text for text in texts if text.strip()]

    def _part_key(self, number: int) -> dict[str, Any]:
        return {**asdict(self.key), "part": number}

    def _read(self, path: Path, number: int) -> list[list[int]]:
        found = read_checked_json(path, DamagedCacheError, _ADVICE)
        check_key(path, found, "generated texts", "file of generated texts", self._part_key(number), _ADVICE)
        with content_of(path, DamagedCacheError, _ADVICE):
            ids = read_record(found, _Part).ids
            if len(ids) != self.key.part_texts or not all(ids) or min(map(min, ids)) < 0:
                raise ValueError("it does not hold the ids of all its texts")
        return ids

    def _sample(self, number: int) -> list[list[int]]:
        """A whole part; openings of equal length share a batch, so that nothing is padded."""
        key, first = self.key, number * self.key.part_texts
        rows = [key.openings[(first + place) % len(key.openings)] for place in range(key.part_texts)]
        by_length: dict[int, list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            by_length[len(row)].append(place)
        where = model_device(self.model)
        found: dict[int, list[int]] = {}
        devices = list(range(torch.cuda.device_count())) if where.type == "cuda" else []
        with inference_mode_of(self.model), torch.random.fork_rng(devices):
            torch.manual_seed(int(hashlib.sha256(f"{key.seed} {number}".encode()).hexdigest()[:15], 16))
            for length, places in sorted(by_length.items()):
                ids = torch.tensor([rows[place] for place in places], device=where)
                sampled = self._continued(ids, key.length - length)
                found.update(zip(places, sampled, strict=True))
        return [found[place] for place in range(key.part_texts)]

    def _continued(self, ids: torch.Tensor, new_tokens: int) -> list[list[int]]:
        ends = self._ends()
        generate: Any = getattr(self.model, "generate", None)
        if generate is None:
            raise DataError(
                f"{type(self.model).__name__} has no method generate, so it can't sample its own texts; give "
                "mom2_dataset a file, a folder or the name of a dataset."
            )
        # What the checkpoint's generation config says of sampling must not count, or the texts are not the model's own.
        out = generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, min_p=None, repetition_penalty=1.0, no_repeat_ngram_size=0,
            eos_token_id=sorted(ends) or None, pad_token_id=pad_id(self.tok),
        )  # fmt: skip
        rows = []
        for row in out.tolist():
            new = row[ids.shape[1] :]
            end = next((place for place, token in enumerate(new) if token in ends), len(new))
            rows.append([*row[: ids.shape[1]], *new[:end]])
        return rows

    def _ends(self) -> set[int]:
        """Tokens that end a text, by the model's generation config and by its tokenizer."""
        found = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        listed = found if isinstance(found, (list, tuple)) else [found]
        return {token for token in (*listed, self.tok.eos_token_id) if token is not None}


def opening_ids(tok: PreTrainedTokenizerBase, openings: Sequence[str] = ()) -> tuple[tuple[int, ...], ...]:
    """What samples begin with: the texts of ``openings``; else the beginning-of-text token, or `OPENINGS`.

    Raises:
        HyperParamsError: an opening without tokens.
    """
    start = encode_text(tok, "a")[:1]
    begins = tok.bos_token_id is not None and start == [tok.bos_token_id]
    if not openings:
        if begins:
            return ((int(tok.bos_token_id),),)
        return tuple(dict.fromkeys((encode_text(tok, word)[0],) for word in OPENINGS))
    rows = tuple(tuple(encode_text(tok, opening)) for opening in openings)
    empty = next((text for text, row in zip(openings, rows, strict=True) if not row), None)
    if empty is not None:
        raise HyperParamsError(f"generated_openings holds {empty!r}, which has no tokens; leave it out.")
    return rows


def corpus_texts(
    source: str | Path | Iterable[Any],
    n_samples: int,
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    max_length: int,
    folder: Path | None = None,
    fingerprint: str = "",
) -> list[str]:
    """As `load_texts`, and for "generated" what a model samples, of at most ``max_length`` tokens each.

    Args:
        source: see `load_texts`.
        n_samples: texts at most.
        model: that samples.
        tok: its tokenizer.
        max_length: tokens of a sampled text.
        folder: where samples are kept; None keeps none.
        fingerprint: of the model, where they are kept.

    Raises:
        DataError: see there. HyperParamsError: too short a length to sample at.
    """
    if source != GENERATED:
        return load_texts(source, n_samples)
    key = GenerationKey(fingerprint, opening_ids(tok), max_length, 0)
    return GeneratedTexts(model, tok, key, n_samples, folder).texts()
