"""Target vectors that are read instead of found anew, and only where they belong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import chat_tokenizer, facts, flipped_byte, requests, tiny_model, tiny_tokenizer
from torch import nn

from easyedit_moe.editors import Editor, make_editor
from easyedit_moe.errors import CacheError, EditingWarning, TargetNotReachedWarning
from easyedit_moe.facts.requests import parse_requests
from easyedit_moe.hparams import GlobalHyperParams, UnKEHyperParams
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.storage.tensors import read_metadata, read_safetensors, write_safetensors
from easyedit_moe.targets import search as targets
from easyedit_moe.targets.cache import cached_targets, weights_hash
from easyedit_moe.targets.search import TargetSearch, TargetSettings, TargetVectors

TOK = tiny_tokenizer()
SETTINGS = TargetSettings(3, 0.1, 0.0625, 0.1, 4.0, 0.05, 256, "subject_last")


pytestmark = pytest.mark.usefixtures("no_editing_warnings")


class Cache:
    """``cached_targets`` in a folder, and how many requests were optimised in each call."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.found = folder / "targets", []
        plain = TargetSearch.find

        def counting(search: TargetSearch, facts: Any, *args: Any) -> TargetVectors:
            if args:  # the cache wants to be handed what is found
                self.found.append(len(facts))
            return plain(search, facts, *args)

        monkeypatch.setattr(TargetSearch, "find", counting)

    def __call__(
        self, model: nn.Module, facts: Any, layer: int = 1, prefixes: Any = (), tok: Any = TOK, **changes: Any
    ) -> TargetVectors:
        view = MoELayerView(model)
        settings = dataclasses.replace(SETTINGS, **changes)
        search = TargetSearch(view, tok, layer, tuple(prefixes), settings, progress=False)
        return cached_targets(self.folder, "tiny", model_fingerprint(view), search, parse_requests(facts))

    def files(self) -> list[Path]:
        return sorted(self.folder.rglob("*.safetensors"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    return Cache(tmp_path, monkeypatch)


def same(a: TargetVectors, b: TargetVectors) -> None:
    for field in dataclasses.fields(TargetVectors):
        found, wanted = getattr(a, field.name), getattr(b, field.name)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


def test_found_once_and_read_afterwards(cache: Cache) -> None:
    model = tiny_model()
    first = cache(model, requests(3))
    plain = targets.compute_targets(MoELayerView(model), TOK, parse_requests(requests(3)), 1, (), SETTINGS, False)
    same(first, plain)
    assert len(cache.files()) == 3
    same(cache(model, requests(3)), first)
    assert cache.found == [3]
    more = cache(model, requests(5)[::-1])
    assert cache.found == [3, 2], "only what is missing is found, whatever the order"
    same(TargetVectors(*(v.flip(0)[:3] for v in vars(more).values())), first)
    assert len(cache.files()) == 5


CHANGES = [
    {"layer": 2}, {"prefixes": ["The fox: "]}, {"steps": 4}, {"lr": 0.2}, {"kl_factor": 0.0}, {"weight_decay": 0.0},
    {"clamp_norm_factor": 1.0}, {"early_stop_loss": 0.0}, {"fact_token": "last"}, {"tok": tiny_tokenizer("bos")},
    {"tok": chat_tokenizer(), "chat": True},
]  # fmt: skip


def test_every_setting_but_the_batch_size_is_part_of_the_key(cache: Cache) -> None:
    assert {f.name for f in dataclasses.fields(TargetSettings)} - {"batch_size"} <= {k for c in CHANGES for k in c}
    model = tiny_model()
    cache(model, requests(2))
    cache(model, requests(2), batch_size=3)
    for changes in CHANGES:
        cache(model, requests(2), **changes)
    assert cache.found == [2] * (1 + len(CHANGES))
    fact = requests(1)[0]
    cache(model, [fact | {"target_new": "Manila"}])
    cache(model, [fact | {"subject": "Darrieux"}])
    assert cache.found[-2:] == [1, 1]


def test_without_a_chat_the_key_is_the_old_one(cache: Cache) -> None:
    model = tiny_model()
    cache(model, requests(1))
    (path,) = cache.files()
    assert "chat" not in read_metadata(path, CacheError, "")["key"]["settings"]


def test_ground_truth_does_not_matter(cache: Cache) -> None:
    fact = requests(1)[0]
    cache(tiny_model(), [fact])
    cache(tiny_model(), [fact | {"ground_truth": "Dutch"}])
    assert cache.found == [1]


@pytest.mark.parametrize("family", ["qwen3_moe", "modulelist"])
def test_targets_at_edited_weights_are_others(family: str, cache: Cache) -> None:
    model = tiny_model(family)
    first = cache(model, requests(1))
    weight = MoELayerView(model).layers[3].experts.read(5)
    before = weight.clone()
    weight[2, 3] += 0.01
    cache(model, requests(1))
    assert cache.found == [1, 1]
    weight.copy_(before)
    same(cache(model, requests(1)), first)
    assert cache.found == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_change_of_any_weight_changes_the_hash(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    view = MoELayerView(model)
    seen = {weights_hash(view)}
    with torch.no_grad():
        for parameter in (model.lm_head.weight, model.model.norm.weight, model.model.layers[2].mlp.experts.down_proj):
            saved = parameter.clone()
            flat = parameter.reshape(-1)
            flat[7] = torch.nextafter(flat[7].float(), torch.tensor(9.0)).to(dtype) if dtype == torch.float32 else 3.0
            seen.add(weights_hash(view))
            parameter.copy_(saved)
            if parameter.dim() > 1:  # the same values in other rows
                parameter[..., [0, 1], :] = saved[..., [1, 0], :]
                seen.add(weights_hash(view))
                parameter.copy_(saved)
    assert len(seen) == 6
    assert weights_hash(view) in seen


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b"", lambda b: b[:-8], flipped_byte])
def test_a_damaged_file_is_made_anew(damage: Callable[[bytes], bytes], cache: Cache) -> None:
    model = tiny_model()
    first = cache(model, requests(2))
    file = cache.files()[0]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(EditingWarning, match="made anew"):
        again = cache(model, requests(2))
    assert cache.found == [2, 1]
    torch.testing.assert_close(again.delta, first.delta, atol=1e-4, rtol=1e-4)
    same(cache(model, requests(2)), again)


def test_a_file_under_another_name_is_refused(cache: Cache) -> None:
    model = tiny_model()
    cache(model, requests(2))
    one, other = cache.files()
    one.write_bytes(other.read_bytes())
    with pytest.raises(CacheError, match="not the target of this request"):
        cache(model, requests(2))


def test_an_interrupted_search_keeps_what_it_found(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    model, solve, calls = tiny_model(), targets._Problem.solve, []

    def second_fails(self: Any, on_step: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(self, on_step)

    monkeypatch.setattr(targets._Problem, "solve", second_fails)
    with pytest.raises(KeyboardInterrupt):
        cache(model, requests(4), batch_size=4)
    assert len(cache.files()) == 2
    cache(model, requests(4), batch_size=4)
    assert cache.found == [4, 2]


def test_missed_targets_are_warned_of_again(cache: Cache) -> None:
    for _ in range(2):
        with pytest.warns(TargetNotReachedWarning, match="3 of 3 targets were not reached"):
            cache(tiny_model(), requests(3))


def test_editors_use_it_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, monkeypatch)
    values = {
        "alg_name": "Global", "model_name": "tiny", "layers": [0, 1], "dtype": "float32", "metric": "identity",
        "v_num_grad_steps": 3,
    }  # fmt: skip
    model = tiny_model()
    plain = make_editor(GlobalHyperParams.from_dict(values), progress=False).edit(model, TOK, facts(2))
    plain.patch.revert(model)
    assert not cache.found
    editor = make_editor(GlobalHyperParams.from_dict(values | {"target_cache_dir": str(cache.folder)}), progress=False)
    for _ in range(2):
        result = editor.edit(model, TOK, facts(2))
        same(result.targets[0], plain.targets[0])
        result.patch.revert(model)
    assert cache.found == [2]
    second = editor.edit(model, TOK, facts(2))
    editor.edit(model, TOK, facts(2), second.memory)
    assert cache.found == [2, 2], "after an edit, targets are others"


def test_files_that_do_not_say_what_was_known(cache: Cache) -> None:
    """Those of earlier versions are read as before."""
    first = cache(tiny_model(), requests(2))
    for path in cache.files():
        tensors, metadata = read_safetensors(path, CacheError, "")
        tensors.pop("known")
        write_safetensors(path, tensors, metadata)
    again = cache(tiny_model(), requests(2))
    assert cache.found == [2]
    same(dataclasses.replace(again, known=first.known), first)
    assert not again.known.any()


def unke(**changes: Any) -> Editor:
    values = {"alg_name": "UnKE", "model_name": "tiny", "layers": [2], "dtype": "float32", "preserve_n_samples": 0}
    values |= {"v_num_grad_steps": 3, "optim_num_step": 2, "kl_factor": 0.5}
    return make_editor(UnKEHyperParams.from_dict(values | changes), progress=False)


@pytest.mark.parametrize("train", ["experts", "layer"])
def test_unke_reads_what_it_found(train: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, model = Cache(tmp_path, monkeypatch), tiny_model()
    plain = unke(train=train).edit(model, TOK, facts(2))
    plain.patch.revert(model)
    assert not cache.found
    editor = unke(train=train, target_cache_dir=str(cache.folder))
    for _ in range(2):
        result = editor.edit(model, TOK, facts(2))
        same(result.targets[0], plain.targets[0])
        assert result.patch.after == plain.patch.after
        result.patch.revert(model)
    assert cache.found == [2]
    editor.edit(model, TOK, facts(2))
    editor.edit(model, TOK, facts(2))
    assert cache.found == [2, 2], "after an edit, targets are others"


def test_unke_shares_targets_only_where_all_settings_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, model = Cache(tmp_path, monkeypatch), tiny_model()
    different = [
        {}, {"layers": [1]}, {"fact_token": "last"}, {"v_num_grad_steps": 4}, {"v_lr": 0.3}, {"v_weight_decay": 0.2},
        {"clamp_norm_factor": 1.0}, {"kl_factor": 0.0}, {"early_stop_loss": 0.0}, {"context_prefixes": ["The fox: "]},
    ]  # fmt: skip
    for changes in [*different, {"train_batch_size": 1}, {"lr": 0.1}, {"target_batch_size": 3}]:
        unke(target_cache_dir=str(cache.folder), **changes).edit(model, TOK, facts(1)).patch.revert(model)
    assert cache.found == [1] * len(different)
    settings = unke().target_settings()[2]
    values = {"alg_name": "Global", "model_name": "tiny", "layers": [2], "dtype": "float32", "metric": "identity"}
    values |= {"v_num_grad_steps": settings.steps, "v_lr": settings.lr, "v_weight_decay": settings.weight_decay}
    values |= {"kl_factor": settings.kl_factor, "clamp_norm_factor": settings.clamp_norm_factor}
    solver = GlobalHyperParams.from_dict(values | {"target_cache_dir": str(cache.folder)})
    make_editor(solver, progress=False).edit(model, TOK, facts(1))
    assert cache.found == [1] * len(different), "a solver that asks the same reads them"
