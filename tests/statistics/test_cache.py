from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TEXTS, flipped_byte, tiny_model, tiny_tokenizer
from torch import nn

from easyedit_moe.errors import CacheError, CoverageWarning, DataError, EditingWarning
from easyedit_moe.hparams import GlobalHyperParams
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.statistics import gather as statistics
from easyedit_moe.statistics.cache import StatisticsKey, load_moments, save_moments, statistics_folder
from easyedit_moe.statistics.gather import layer_statistics
from easyedit_moe.statistics.moments import LayerMoments, collect_moments
from easyedit_moe.storage import files
from easyedit_moe.storage import tensors as stored_tensors
from easyedit_moe.storage.tensors import read_safetensors, write_safetensors

KEY = StatisticsKey("f" * 64, 3, "c" * 64, "t" * 64, 100, 64, "float32", 8.0)


def some_moments(dtype: torch.dtype = torch.float32) -> LayerMoments:
    keys = torch.randn(4, 6, 6, dtype=dtype)
    return LayerMoments(keys, torch.tensor([3, 0, 7, 2**40]), torch.randn(5, 5, dtype=dtype), 12)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / KEY.file_name()
    save_moments(path, KEY, some_moments())
    return path


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_is_bit_equal(dtype: torch.dtype, tmp_path: Path) -> None:
    moments = some_moments(dtype)
    path, key = tmp_path / "new" / "folder" / KEY.file_name(), dataclasses.replace(KEY, dtype=str(dtype)[6:])
    save_moments(path, key, moments)
    back = load_moments(path, key)
    for name in ("keys", "counts", "output"):
        assert getattr(back, name).dtype == getattr(moments, name).dtype
        assert torch.equal(getattr(back, name), getattr(moments, name))
    assert back.num_tokens == 12
    assert [p.name for p in path.parent.iterdir()] == [path.name]


OTHER = {
    "fingerprint": "e" * 64,
    "layer": 4,
    "corpus": "d" * 64,
    "tokens": "u" * 64,
    "n_samples": 99,
    "max_length": 65,
    "dtype": "float64",
    "coverage": None,
    "site": "dense",
}


def test_every_part_of_the_key_is_in_the_file_name() -> None:
    assert set(OTHER) == {f.name for f in dataclasses.fields(StatisticsKey)}
    names = {dataclasses.replace(KEY, **{name: value}).file_name() for name, value in OTHER.items()}
    assert len(names | {KEY.file_name()}) == len(OTHER) + 1


@pytest.mark.parametrize("name", OTHER)
def test_another_key_is_refused(name: str, stored: Path) -> None:
    before = stored.read_bytes()
    with pytest.raises(CacheError, match=f"another model or setting \\({name}: expected"):
        load_moments(stored, dataclasses.replace(KEY, **{name: OTHER[name]}))
    assert stored.read_bytes() == before


def _truncated(data: bytes) -> bytes:
    return data[: len(data) - 10]


def _cut_header(data: bytes) -> bytes:
    return data[:20]


def _random(data: bytes) -> bytes:
    return bytes(torch.randint(0, 256, (500,), dtype=torch.uint8).tolist())


@pytest.mark.parametrize("damage", [_truncated, _cut_header, _random, lambda data: b""])
def test_damaged_files_are_refused_and_left_alone(damage: Any, stored: Path) -> None:
    broken = damage(stored.read_bytes())
    stored.write_bytes(broken)
    with pytest.raises(CacheError, match="truncated, corrupt or not of this package"):
        load_moments(stored, KEY)
    assert stored.read_bytes() == broken


@pytest.mark.parametrize("name", ["keys", "output"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(name: str, bad: float, tmp_path: Path) -> None:
    moments = some_moments()
    getattr(moments, name)[..., 1, 1] = bad
    path = tmp_path / KEY.file_name()
    save_moments(path, KEY, moments)
    before = path.read_bytes()
    with pytest.raises(CacheError, match="incomplete or non-finite"):
        load_moments(path, KEY)
    assert path.read_bytes() == before


def test_files_of_another_kind(tmp_path: Path) -> None:
    foreign, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"x": torch.zeros(2)}, foreign)
    with pytest.raises(CacheError, match="not of this package"):
        load_moments(foreign, KEY)
    write_safetensors(other, {"x": torch.zeros(2)}, {"kind": "patch", "schema": 1})
    with pytest.raises(CacheError, match="is not a file of statistics"):
        load_moments(other, KEY)
    write_safetensors(other, {"keys": torch.zeros(1, 2, 2)}, {"kind": "moments", "schema": 1, "key": KEY.content()})
    with pytest.raises(CacheError, match="lacks num_tokens"):
        load_moments(other, KEY)
    with pytest.raises(CacheError, match="does not exist"):
        load_moments(tmp_path / "c.safetensors", KEY)


def test_files_explain_themselves(stored: Path) -> None:
    tensors, metadata = read_safetensors(stored, CacheError, "")
    assert set(tensors) == set(load_file(stored)) == {"keys", "counts", "output"}
    assert metadata == {"schema": 1, "kind": "moments", "key": KEY.content(), "num_tokens": 12}
    assert json.dumps(metadata)


@pytest.mark.parametrize("when", ["while writing", "before renaming"])
def test_writing_is_atomic(when: str, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stored.read_bytes()

    def half(tensors: Any, path: Any, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half a file")
        if when == "while writing":
            raise OSError("No space left on device")

    def refuse(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stored_tensors, "save_file", half)
    if when == "before renaming":
        monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises((OSError, KeyboardInterrupt)):
        save_moments(stored, KEY, some_moments())
    assert stored.read_bytes() == before
    assert list(stored.parent.iterdir()) == [stored]


def test_folder_is_named_after_the_model() -> None:
    assert statistics_folder("s", "Qwen/Qwen3-30B-A3B", "ab" * 32) == Path("s/Qwen3-30B-A3B-abababababababab")
    assert statistics_folder("s", "/models/my model/", "ab" * 32).name == "my_model-abababababababab"
    assert statistics_folder("s", "", "ab" * 32).name == "model-abababababababab"


# ---------------------------------------------------------------- fingerprint


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
def test_fingerprint_ignores_edits_only(family: str) -> None:
    model = tiny_model(family)
    view = MoELayerView(model)
    before = model_fingerprint(view)
    assert before == model_fingerprint(MoELayerView(tiny_model(family)))
    with torch.no_grad():
        for moe in view.layers.values():
            for expert in range(moe.experts.layout.num_experts):
                moe.experts.read(expert).add_(1.0)
    assert model_fingerprint(view) == before
    assert model_fingerprint(MoELayerView(tiny_model(family, seed=1))) != before
    assert model_fingerprint(MoELayerView(tiny_model(family, dtype=torch.bfloat16))) != before
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    assert model_fingerprint(view) != before


def test_fingerprints_of_families_differ() -> None:
    found = {model_fingerprint(MoELayerView(tiny_model(f))) for f in ("qwen3_moe", "olmoe", "mixtral", "granitemoe")}
    assert len(found) == 4


# ---------------------------------------------------------------- statistics


class Setting:
    """A tiny model, its hparams, and a record of which layers were collected."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.corpus = folder / "corpus.txt"
        self.corpus.write_text("\n".join(TEXTS), encoding="utf-8")
        self.model, self.tok = tiny_model(), tiny_tokenizer()
        self.collected: list[list[int]] = []

        def counting(view: Any, tok: Any, texts: Any, layers: Any, *args: Any, **kwargs: Any) -> Any:
            self.collected.append(list(layers))
            return collect_moments(view, tok, texts, layers, *args, **kwargs)

        monkeypatch.setattr(statistics, "collect_moments", counting)

    def run(self, layers: list[int], model: nn.Module | None = None, tok: Any = None, **changes: Any) -> dict:
        values = {
            "alg_name": "Global", "model_name": "some/tiny", "layers": layers, "mom2_dataset": str(self.corpus),
            "stats_dir": str(self.folder / "stats"), "max_length": 32,
        }  # fmt: skip
        hp = GlobalHyperParams.from_dict(values | changes)
        view = MoELayerView(model or self.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CoverageWarning)
            return layer_statistics(view, tok or self.tok, hp, layers, model_fingerprint(view), progress=False)

    def files(self) -> list[Path]:
        return sorted((self.folder / "stats").glob("tiny-*/*"))


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    return Setting(tmp_path, monkeypatch)


def test_the_cache_is_used_and_only_missing_layers_are_collected(setting: Setting) -> None:
    first = setting.run([1, 2])
    assert setting.collected == [[1, 2]]
    assert sum(f.is_file() for f in setting.files()) == 2
    again = setting.run([2, 3])
    assert setting.collected == [[1, 2], [3]]
    assert list(again) == [2, 3]
    assert torch.equal(first[2].keys, again[2].keys)
    assert torch.equal(first[2].counts, again[2].counts)
    assert torch.equal(first[2].output, again[2].output)
    setting.run([1, 2, 3])
    assert len(setting.collected) == 2


def test_other_settings_do_not_share_a_file(setting: Setting) -> None:
    setting.run([1])
    setting.run([1], mom2_n_samples=3)
    setting.run([1], max_length=5)
    setting.run([1], mom2_dtype="float64")
    setting.run([1], model=tiny_model(seed=1))
    setting.run([1], model=tiny_model(dtype=torch.bfloat16))
    setting.run([1], tok=tiny_tokenizer("bos"))
    assert setting.collected == [[1]] * 7
    setting.run([1], mom2_n_samples=len(TEXTS))
    assert len(setting.collected) == 7, "that many samples are there anyway"


def test_any_text_of_the_corpus_counts(setting: Setting) -> None:
    longer = TEXTS * 3
    for texts in (longer, [*longer[:-1], "Another last text."], longer[1:] + longer[:1]):
        setting.corpus.write_text("\n".join(texts), encoding="utf-8")
        setting.run([1])
    assert setting.collected == [[1]] * 3


def test_samples_and_dtype_reach_the_statistics(setting: Setting) -> None:
    every, few = setting.run([1])[1], setting.run([1], mom2_n_samples=2, mom2_dtype="float64")[1]
    assert (every.keys.dtype, few.keys.dtype) == (torch.float32, torch.float64)
    assert few.num_tokens < every.num_tokens
    assert setting.run([1], max_length=2)[1].num_tokens == 2 * len(TEXTS)


def test_tokens_bound_the_corpus(setting: Setting) -> None:
    lengths = [len(setting.tok(text)["input_ids"]) for text in TEXTS]
    assert setting.run([1], mom2_n_tokens=lengths[0])[1].num_tokens == lengths[0]
    assert setting.run([1], mom2_n_tokens=lengths[0] + 1)[1].num_tokens == sum(lengths[:2])
    assert setting.run([1], mom2_n_tokens=2 * len(TEXTS), max_length=2)[1].num_tokens == 2 * len(TEXTS)
    assert setting.run([1], mom2_n_tokens=10**9)[1].num_tokens == sum(lengths)
    assert setting.run([1], mom2_n_tokens=10**9, mom2_n_samples=1)[1].num_tokens == lengths[0]


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b"", flipped_byte])
def test_a_damaged_file_is_made_anew(damage: Callable[[bytes], bytes], setting: Setting) -> None:
    first = setting.run([1, 2])
    file = next(f for f in setting.files() if f.name.startswith("layer2"))
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with pytest.warns(EditingWarning, match=r"layer2.* made anew"):
        again = setting.run([1, 2])
    assert file.read_bytes() == whole
    assert len(setting.collected) == 2
    assert all(torch.equal(again[layer].keys, first[layer].keys) for layer in (1, 2))


def test_missing_corpus(setting: Setting) -> None:
    with pytest.raises(DataError, match="does not exist"):
        setting.run([1], mom2_dataset="nowhere.txt")


def test_thin_coverage_warns(setting: Setting) -> None:
    hp = GlobalHyperParams(
        alg_name="Global", model_name="t", layers=[1], mom2_dataset=str(setting.corpus), mom2_n_samples=1,
        stats_dir=str(setting.folder), low_coverage="frozen", min_coverage=9,
    )  # fmt: skip
    view = MoELayerView(setting.model)
    with pytest.warns(CoverageWarning, match=r"Layer 1: 8 of 8 experts .* fewer than 24 tokens .*'frozen' below .* 9"):
        layer_statistics(view, setting.tok, hp, [1], "f" * 64, progress=False)
