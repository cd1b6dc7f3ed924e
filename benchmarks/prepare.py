"""``prepare`` where everything is cached: how long its corpus takes to find, and statistics, null spaces and Tucker
bases of a shape to read.

The corpus is a file of as many texts as the hparams read, and its tokenizer has as many tokens as the papers' models:
it is found by its record, and for comparison read anew, as where no record holds.

The files are made by the functions that write them, of cheap content: moments near the identity, bases of orthogonal
columns (parts of a Householder reflection). The files are in the system's cache when they are read, as after they were
written, so that what is measured is what reading costs beside the disk; a disk adds the bytes over its speed.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.harness import timed
from benchmarks.shapes import MODELS, QUICK, ModelShape, one_layer_model
from easyedit_moe.algebra.nullspace import ExpertProjector, NullSpace
from easyedit_moe.algebra.tucker import TuckerBasis
from easyedit_moe.hparams import load_hyperparams
from easyedit_moe.moe.layers import MoELayer, MoELayerView
from easyedit_moe.statistics import bases, null_spaces
from easyedit_moe.statistics.cache import StatisticsKey, load_moments, save_moments, statistics_folder
from easyedit_moe.statistics.known_corpus import CorpusBounds, KnownCorpus
from easyedit_moe.statistics.moments import LayerMoments
from easyedit_moe.statistics.token_cache import rules_hash
from easyedit_moe.storage.checksums import checksum

FINGERPRINT = "f" * 32
VOCAB = 151_000
Found = dict[str, tuple[float, float, int]]
"""Seconds, seconds of a CPU and bytes of each thing that is read."""


@dataclass(frozen=True)
class Options:
    """``layers`` are those of the model's hparams."""

    model: str = "qwen3-30b-a3b"
    device: str = "cpu"
    quick: bool = False


def run(options: Options) -> list[dict[str, Any]]:
    """A row per kind of file, of all layers together, and two of the corpus."""
    shape = QUICK if options.quick else MODELS[options.model]
    ranks = dict(zip(("rank_expert", "rank_out", "rank_in"), shape.ranks, strict=True))
    (moe,) = MoELayerView(one_layer_model(shape, options.device)).layers.values()
    with tempfile.TemporaryDirectory() as folder:
        values = {"stats_dir": folder, "nullspace_rank": 0.5, "nullspace_threshold": None, **ranks}
        hparams = load_hyperparams("MoTE/qwen3-30b-a3b", **values)
        corpus = _corpus(
            Path(folder), 100 if options.quick else hparams.mom2_n_samples, 500 if options.quick else VOCAB
        )
        layers = [_layer(shape, replace(moe, index=layer), hparams) for layer in shape.layers]
    files = [
        {
            "benchmark": "reading what is cached", "model": shape.name, "device": options.device, "what": what,
            "layers": len(parts), "seconds": sum(one[what][0] for one in parts),
            "seconds of a CPU": sum(one[what][1] for one in parts), "bytes": sum(one[what][2] for one in parts),
        }
        for parts in ([corpus], layers)
        for what in parts[0]
    ]  # fmt: skip
    for row in files:
        row["GB/s"] = row["bytes"] / row["seconds"] / 1e9
    return files


def _corpus(folder: Path, texts: int, vocabulary: int) -> Found:
    """Seconds and bytes of a corpus that is read anew, and of one that is found by its record."""
    found: Found = {}
    file, tok = folder / "corpus.txt", _tokenizer(vocabulary)
    line = " ".join(["A sentence of a text, about as long as those of an encyclopaedia are."] * 40)
    with file.open("w", encoding="utf-8") as out:
        out.writelines(f"{number} {line}\n" for number in range(texts))

    def find() -> KnownCorpus:
        return KnownCorpus(tok, str(file), CorpusBounds(texts, None, 512), folder)

    rules_hash(tok)  # warm
    first = _note(found, "corpus, read anew", file.stat().st_size, find)
    size = sum(record.stat().st_size for record in (folder / "corpora").iterdir())
    again = _note(found, "corpus, found by its record", size, find)
    assert (again.name, again.tokens) == (first.name, first.tokens)
    file.unlink()
    return found


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding with that many tokens, most of them merges of two letters that no text here holds."""
    letters = [chr(0x4E00 + number) for number in range(math.isqrt(vocabulary) + 1)]
    merges = list(islice(product(letters, letters), vocabulary - len(letters)))
    names = [*letters, *map("".join, merges), "<end>"]
    model = models.BPE({name: number for number, name in enumerate(names)}, merges, unk_token="<end>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="<end>", pad_token="<end>")


def _note(found: Found, what: str, size: int, call: Callable[[], Any]) -> Any:
    before = time.process_time()
    seconds, result = timed(call)
    found[what] = (seconds, time.process_time() - before, size)
    return result


def _layer(shape: ModelShape, moe: MoELayer, hparams: Any) -> Found:
    """Seconds and bytes of each part of one layer's way from the files to what solvers need."""
    found: Found = {}
    folder = statistics_folder(hparams.stats_dir, hparams.model_name, FINGERPRINT)
    key = StatisticsKey(FINGERPRINT, moe.index, "corpus", "tokens", 1, 512, "float32", None)
    moments = _moments(shape)
    path = folder / key.file_name()
    save_moments(path, key, moments)
    null_key = null_spaces.NullSpaceKey.of(moe.index, moments, hparams)
    null_spaces.save_null_space(folder / null_key.file_name(), null_key, _null_space(shape))
    sigma = moments.pooled()
    basis_key = bases.basis_key(moe, hparams, [sigma], FINGERPRINT)
    bases.save_basis(folder / basis_key.file_name(), basis_key, _basis(shape))
    del moments, sigma

    def note(what: str, size: int, call: Callable[[], Any]) -> Any:
        return _note(found, what, size, call)

    def size_of(file: Path) -> int:
        return file.stat().st_size

    read = note("moments", size_of(path), lambda: load_moments(path, key))
    null_path, basis_path = folder / null_key.file_name(), folder / basis_key.file_name()
    note("null spaces", size_of(null_path), lambda: null_spaces.layer_null_space(moe.index, read, hparams, FINGERPRINT))
    note("Tucker basis", size_of(basis_path), lambda: bases.layer_basis(moe, hparams, read, FINGERPRINT))
    tensors = (read.keys, read.counts, read.output)
    note("checksum of the moments alone", size_of(path), lambda: [checksum(tensor) for tensor in tensors])
    for file in (path, null_path, basis_path):
        file.unlink()
    return found


def _moments(shape: ModelShape) -> LayerMoments:
    e, h, d = shape.experts, shape.d_hidden, shape.d_model
    keys = torch.eye(h).expand(e, h, h) * torch.linspace(1, 2, e)[:, None, None]
    return LayerMoments(keys.contiguous(), torch.full((e,), 1000), torch.eye(d), 1000 * e)


def _null_space(shape: ModelShape) -> NullSpace:
    columns = _reflection(shape.d_hidden)[:, : shape.d_hidden // 2]
    return NullSpace(tuple(ExpertProjector(columns, False) for _ in range(shape.experts)))


def _basis(shape: ModelShape) -> TuckerBasis:
    sizes = (shape.experts, shape.d_model, shape.d_hidden)
    return TuckerBasis(*(_reflection(n)[:, :r].contiguous() for n, r in zip(sizes, shape.ranks, strict=True)), 0.0)


def _reflection(size: int) -> Tensor:
    """An orthogonal matrix."""
    normal = torch.ones(size, 1, dtype=torch.float64) / size**0.5
    return torch.eye(size, dtype=torch.float64) - 2 * normal @ normal.T
