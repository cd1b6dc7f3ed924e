"""A corpus is tokenised once and hashed once, whatever layers, settings and processes ask for; damage is made good."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import TEXTS, flipped_byte, tiny_model, tiny_tokenizer

from easyedit_moe.errors import CoverageWarning, EditingWarning
from easyedit_moe.hparams import GlobalHyperParams
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.statistics import gather, known_corpus, moments, token_cache
from easyedit_moe.statistics.corpus import source_stamp
from easyedit_moe.statistics.moments import LayerMoments


class Corpus:
    """A file of texts, and what was tokenised and hashed of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.file = folder, folder / "corpus.txt"
        self.file.write_text("\n".join(TEXTS * 3), encoding="utf-8")
        self.tokenised: list[str] = []
        self.hashed: list[int] = []
        encode, hashing = moments.encode_cut, known_corpus.corpus_hash
        for module in (moments, token_cache, known_corpus):
            monkeypatch.setattr(module, "encode_cut", lambda tok, text, cut: self._seen(text) or encode(tok, text, cut))
        monkeypatch.setattr(known_corpus, "corpus_hash", lambda texts: self.hashed.append(len(texts)) or hashing(texts))
        monkeypatch.setattr(moments, "SHARD_CHARACTERS", 240)

    def _seen(self, text: Any) -> None:
        if isinstance(text, str):
            self.tokenised.append(text)

    def __call__(self, layers: list[int], tok: Any = None, model: Any = None, **changes: Any) -> Any:
        """Statistics of some layers; ``tokenised`` and ``hashed`` (more texts than the first few) are this call's."""
        values = {
            "alg_name": "Global", "model_name": "tiny", "layers": [0, 1, 2, 3], "mom2_dataset": str(self.file),
            "stats_dir": str(self.folder / "stats"), "coverage_target": None,
        }  # fmt: skip
        self.tokenised.clear()
        self.hashed.clear()
        view = MoELayerView(model or tiny_model())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CoverageWarning)
            return gather.layer_statistics(
                view, tok or tiny_tokenizer(), GlobalHyperParams.from_dict(values | changes), layers,
                model_fingerprint(view), progress=False,
            )  # fmt: skip

    def files(self) -> list[Path]:
        return sorted((self.folder / "stats" / "tokens").iterdir())

    def of_all(self) -> int:
        """Times that more than the first few texts were hashed."""
        return sum(count > 8 for count in self.hashed)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    return Corpus(tmp_path, monkeypatch)


def same(one: dict[int, LayerMoments], other: dict[int, LayerMoments]) -> None:
    assert one.keys() == other.keys()
    for layer in one:
        assert torch.equal(one[layer].keys, other[layer].keys)
        assert one[layer].num_tokens == other[layer].num_tokens


def test_layers_models_and_dtypes_share_the_tokens(corpus: Corpus) -> None:
    corpus([1])
    assert corpus.tokenised == TEXTS * 3
    for more in (
        {"layers": [2]},
        {"layers": [1], "mom2_dtype": "float64"},
        {"layers": [1], "model": tiny_model(seed=3)},
    ):
        corpus(**more)
        assert corpus.tokenised == []
    assert len(corpus.files()) == 1


def test_the_statistics_are_those_without_it(corpus: Corpus) -> None:
    corpus([1])
    from_file = corpus([2])
    plain = moments.collect_moments(MoELayerView(tiny_model()), tiny_tokenizer(), TEXTS * 3, [2], progress=False)
    same(from_file, plain)


@pytest.mark.parametrize("change", ["tokenizer", "length", "texts", "number"])
def test_anything_that_changes_tokens_has_a_file_of_its_own(change: str, corpus: Corpus) -> None:
    corpus([1])
    if change == "texts":
        corpus.file.write_text("\n".join([*(TEXTS * 3)[:-1], "Paris is in Africa."]), encoding="utf-8")
    changes: dict[str, Any] = {"length": {"max_length": 5}, "number": {"mom2_n_samples": 9}}.get(change, {})
    tok = tiny_tokenizer("bos") if change == "tokenizer" else None
    corpus([1], tok, **changes)
    assert len(corpus.tokenised) == (9 if change == "number" else len(TEXTS) * 3)
    assert len(corpus.files()) == 2


def test_only_what_was_read_is_kept_and_the_rest_added_later(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that stops early keeps no more than it reads, and tokenises little more."""
    monkeypatch.setattr(moments, "ROUND_SHARDS", 1)
    corpus([1], coverage_target=0.1)
    first = list(corpus.tokenised)
    assert 0 < len(first) < len(TEXTS) * 3
    kept = len(load_file(corpus.files()[0])["lengths"])
    corpus([1])
    assert corpus.tokenised == (TEXTS * 3)[kept:]
    assert first == (TEXTS * 3)[: len(first)]
    assert kept <= len(first)


def test_a_budget_of_tokens_is_counted_and_used_by_one_tokenising(corpus: Corpus) -> None:
    found = corpus([1], mom2_n_tokens=40)
    assert corpus.tokenised == (TEXTS * 3)[: len(corpus.tokenised)]
    assert len(set(corpus.tokenised)) == len(corpus.tokenised)
    plain = moments.collect_moments(
        MoELayerView(tiny_model()), tiny_tokenizer(), list(corpus.tokenised), [1], progress=False
    )
    same(found, plain)


DAMAGES = ["byte", "truncated", "ids", "parts", "lengths"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew(damage: str, corpus: Corpus) -> None:
    corpus([1])
    wanted = moments.collect_moments(MoELayerView(tiny_model()), tiny_tokenizer(), TEXTS * 3, [3], progress=False)
    (file,) = corpus.files()
    whole = file.read_bytes()
    if damage == "byte":
        file.write_bytes(flipped_byte(whole))
    elif damage == "truncated":
        file.write_bytes(whole[:-40])
    else:
        rewritten(file, damage)
    with pytest.warns(EditingWarning, match="tokenised anew"):
        found = corpus([3])
    assert corpus.tokenised == TEXTS * 3
    assert file.read_bytes() == whole
    same(found, wanted)


def rewritten(file: Path, name: str) -> None:
    """Valid as a file, by an older version that wrote no digest; wrong as tokens."""
    tensors, (_, metadata) = load_file(file), token_cache.read_safetensors(file, ValueError, "")
    change = {"ids": 10**6, "parts": 10**3, "lengths": 1}[name]
    tensors[name] = tensors[name] + change
    token_cache.write_safetensors(file, tensors, metadata)


def test_a_corpus_is_hashed_once_while_its_files_are_the_same(corpus: Corpus) -> None:
    corpus([1])
    assert corpus.of_all() == 1
    for layers in ([1], [2], [1, 2]):
        corpus(layers)
        assert corpus.of_all() == 0
    corpus([1], mom2_n_samples=20)
    assert corpus.of_all() == 1
    state = corpus.file.stat()
    text = corpus.file.read_text(encoding="utf-8")
    corpus.file.write_text(text.replace("Paris", "Rome!"), encoding="utf-8")
    os.utime(corpus.file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    found = corpus([1])
    assert corpus.of_all() == 1
    assert int(found[1].num_tokens) > 0


def test_a_folder_changes_with_any_of_its_files(tmp_path: Path) -> None:
    for name in ("a.txt", "deep/b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('"one"\n', encoding="utf-8")
    before = source_stamp(tmp_path)
    assert before == source_stamp(str(tmp_path))
    assert len(before or ()) == 2
    (tmp_path / "deep" / "b.jsonl").write_text('"one or two"\n', encoding="utf-8")
    assert source_stamp(tmp_path) != before
    assert source_stamp("no/such/file") is None
    assert source_stamp("generated") is None
    assert len(source_stamp("factworld") or ()) == 1
