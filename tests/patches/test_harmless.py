"""Patches refuse what they are not for, whatever its kind, and say which weights and which patch are the reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_patches import new_values, update_for, write, write_tensors
from tiny import assert_same_state, state_of, tiny_model
from torch import Tensor, nn

from easyedit_moe.errors import AlreadyAppliedError, EditingWarning, PatchError
from easyedit_moe.moe.fingerprint import model_fingerprint, weights_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches import groups
from easyedit_moe.patches.files import load_patch
from easyedit_moe.patches.tensors import TensorPatch
from easyedit_moe.patches.weights import PatchWriter, WeightPatch, writing
from easyedit_moe.storage.checksums import checksum
from easyedit_moe.storage.tensors import read_safetensors, write_safetensors

FAMILIES = ["qwen3_moe", "gpt_oss", "modulelist"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Patch = WeightPatch | TensorPatch
Maker = Callable[..., Patch]


def weights(model: nn.Module, seed: int = 0) -> WeightPatch:
    return write(model, seed=seed)


def tensors(model: nn.Module, seed: int = 0) -> TensorPatch:
    return write_tensors(model, new_values(model, seed))


KINDS = pytest.mark.parametrize("make", [weights, tensors])


def reloaded(patch: Patch, folder: Path, keep_originals: bool = False, name: str = "p") -> Any:
    patch.save(folder / f"{name}.safetensors", keep_originals=keep_originals)
    return load_patch(folder / f"{name}.safetensors")


# ---------------------------------------------------------------- what is in the file


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_checksums_are_of_both_ends(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    start, model = tiny_model(family, dtype=dtype), tiny_model(family, dtype=dtype)
    patch = reloaded(write(model), tmp_path)
    for which, of in (("before", start), ("after", model)):
        view = MoELayerView(of)
        found = {
            layer: {expert: checksum(view.layers[layer].experts.read(expert).contiguous()) for expert in (0, 3, 6)}
            for layer in (1, 2)
        }
        assert getattr(patch, which) == found
    assert patch.dtypes == dict.fromkeys((1, 2), str(dtype).removeprefix("torch."))
    parameters = dict(model.named_parameters())
    for layer, expert in patch.matrices():
        stored = patch.stored[layer]
        matrix = stored.matrix(parameters[stored.parameter_of(expert)].detach(), expert)
        assert torch.equal(matrix, MoELayerView(model).layers[layer].experts.read(expert))
        assert stored.parameter_of(expert).startswith(patch.names[layer] + ".")


@KINDS
def test_everything_survives_saving(make: Maker, tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    base = weights_fingerprint(MoELayerView(model))
    patch = make(model)
    patch.parent, patch.warnings = "0123456789abcdef", ["a warning"]
    patch.metadata["diagnosis"] = {"layer": [1.5, None]}
    loaded = reloaded(patch, tmp_path)
    assert patch.base == base
    assert patch.reports
    for name in ("id", "parent", "base", "fingerprint", "before", "after", "warnings", "reports", "metadata", "dtypes"):
        assert getattr(loaded, name) == getattr(patch, name), name
    again = reloaded(loaded, tmp_path, name="again")
    assert again.id == patch.id
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "p.safetensors").read_bytes()


@KINDS
def test_ids_tell_edits_apart_and_are_those_of_content(make: Maker) -> None:
    one, same, other = (make(tiny_model(), seed) for seed in (0, 0, 1))
    assert one.id == same.id != other.id
    assert len(one.id) == 16
    one.parent = other.id
    one.metadata["note"] = "another"
    assert one.id == same.id
    assert make(tiny_model(seed=3)).id != one.id


@KINDS
def test_the_base_is_the_state_of_all_down_projections(make: Maker) -> None:
    plain, changed = tiny_model(), tiny_model()
    with torch.no_grad():
        changed.model.layers[3].mlp.experts.down_proj[7, 2, 1] += 0.5
    first, second = make(plain), make(changed)
    assert first.fingerprint == second.fingerprint
    assert first.base != second.base


@KINDS
def test_a_file_that_was_tampered_with(make: Maker, tmp_path: Path) -> None:
    patch = make(tiny_model())
    path = tmp_path / "p.safetensors"
    patch.save(path)
    stored, metadata = read_safetensors(path, PatchError, "")
    for part in ("before", "fingerprint"):
        changed = dict(metadata)
        if part == "fingerprint":
            changed[part] = "0" * 64
        else:
            first = next(iter(changed[part]))
            inner = changed[part][first]
            changed[part] = {**changed[part], first: {"0": 1} if isinstance(inner, dict) else inner + 1}
        write_safetensors(path, stored, changed)
        with pytest.raises(PatchError, match=r"damaged: its (id|checksums)"):
            load_patch(path)
    for part in ("reports", "base", "warnings"):
        write_safetensors(path, stored, {name: value for name, value in metadata.items() if name != part})
        with pytest.raises(PatchError, match=f"damaged: its content lacks {part}"):
            load_patch(path)


# ---------------------------------------------------------------- applying


@KINDS
@pytest.mark.parametrize("family", FAMILIES)
def test_applied_twice(make: Maker, family: str, tmp_path: Path) -> None:
    model, copy = tiny_model(family), tiny_model(family)
    loaded = reloaded(make(model), tmp_path)
    edited = state_of(model)
    with pytest.raises(AlreadyAppliedError, match="already applied"):
        loaded.apply(model)
    assert_same_state(edited, state_of(model))
    loaded.apply(copy)
    with pytest.raises(AlreadyAppliedError):
        loaded.apply(copy)
    with pytest.raises(AlreadyAppliedError):
        load_patch(tmp_path / "p.safetensors").apply(copy)
    assert_same_state(edited, state_of(copy))


@KINDS
def test_the_parent_that_is_missing_is_named(make: Maker, tmp_path: Path) -> None:
    model, copy = tiny_model(), tiny_model()
    start = state_of(copy)
    first = make(model, 0)
    second = make(model, 1)
    second.parent = first.id
    loaded = reloaded(second, tmp_path)
    with pytest.raises(PatchError, match=f"patch {first.id}, which is missing"):
        loaded.apply(copy)
    assert_same_state(start, state_of(copy))
    reloaded(first, tmp_path, name="first").apply(copy)
    loaded.apply(copy)
    assert_same_state(state_of(model), state_of(copy))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_matrix_that_differs_is_named(family: str, tmp_path: Path) -> None:
    model, copy = tiny_model(family), tiny_model(family)
    loaded = reloaded(write(model), tmp_path)
    with torch.no_grad():
        MoELayerView(copy).layers[2].experts.read(3)[0, 0] += 1
    before = state_of(copy)
    with pytest.raises(PatchError, match="Layer 2, expert 3 does not hold the weights on which this patch was made"):
        loaded.apply(copy)
    assert_same_state(before, state_of(copy))


@KINDS
def test_a_model_that_holds_it_in_part(make: Maker, tmp_path: Path) -> None:
    model, copy = tiny_model(), tiny_model()
    loaded = reloaded(make(model), tmp_path)
    with torch.no_grad():
        name = "model.layers.1.mlp.experts.down_proj"
        copy.get_parameter(name).copy_(model.get_parameter(name))
    before = state_of(copy)
    for act in (loaded.apply, lambda m: loaded.revert(m, base=tiny_model())):
        with pytest.raises(PatchError, match="in part"):
            act(copy)
        assert_same_state(before, state_of(copy))


def test_an_edit_that_rounding_swallowed_can_be_applied_and_reverted(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    before = state_of(model)
    loaded = reloaded(write(model, scale=1e-9), tmp_path)
    assert loaded.before == loaded.after
    loaded.apply(model)
    loaded.revert(model)
    assert_same_state(before, state_of(model))


# ---------------------------------------------------------------- a machine that rounds otherwise


@pytest.fixture
def other_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = groups.Group.add

    def add(self: groups.Group, *args: Any) -> float:
        lost = plain(self, *args)
        bits = {4: torch.int32, 2: torch.int16}[self.weights.element_size()]
        self.weights[:, 1, 2].view(bits).bitwise_xor_(1)
        return lost

    monkeypatch.setattr(groups.Group, "add", add)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_rounding(family: str, dtype: torch.dtype, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    made = tiny_model(family, dtype=dtype)
    patch = write(made)
    plain = reloaded(patch, tmp_path)
    exact = reloaded(patch, tmp_path, keep_originals=True)
    request.getfixturevalue("other_rounding")
    model = tiny_model(family, dtype=dtype)
    before = state_of(model)
    with pytest.warns(EditingWarning, match="rounds the patch otherwise"):
        plain.apply(model)
    assert plain.written != plain.after == patch.after
    assert plain.id == patch.id
    with pytest.raises(PatchError, match="rounds the patch otherwise"):
        plain.save(tmp_path / "no.safetensors", keep_originals=True)
    assert not (tmp_path / "no.safetensors").exists()
    plain.revert(model)
    assert_same_state(before, state_of(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact.apply(model)
    assert_same_state(state_of(made), state_of(model))
    exact.revert(model)
    assert_same_state(before, state_of(model))


# ---------------------------------------------------------------- reverting in a new process


def of_state_dict(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def of_function(model: nn.Module) -> Callable[[str], Tensor]:
    return of_state_dict(model).__getitem__


@KINDS
@pytest.mark.parametrize("base", [None, lambda model: model, of_state_dict, of_function])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reverting_a_loaded_patch(make: Maker, base: Any, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, start = tiny_model(family, dtype=dtype), tiny_model(family, dtype=dtype)
    before = state_of(start)
    loaded = reloaded(make(model), tmp_path, keep_originals=base is None)
    assert bool(loaded.flips) == (base is None)
    loaded.revert(model, base=None if base is None else base(start))
    assert_same_state(before, state_of(model))
    with pytest.raises(PatchError, match="not applied"):
        loaded.revert(model)
    loaded.apply(model)
    loaded.revert(model)
    assert_same_state(before, state_of(model))


def test_a_base_whose_experts_are_stored_otherwise(tmp_path: Path) -> None:
    """The checksum is of the matrix, so a packed base serves a model with one module per expert."""
    model, packed = tiny_model("modulelist"), tiny_model("qwen3_moe")
    before = state_of(model)
    loaded = reloaded(write(model), tmp_path)
    loaded.revert(model, base=packed)
    assert_same_state(before, state_of(model))


@KINDS
def test_what_is_missing_for_a_revert_is_said(make: Maker, tmp_path: Path) -> None:
    model = tiny_model()
    loaded = reloaded(make(model), tmp_path)
    edited = state_of(model)
    cases = {
        "keep_originals=True": None,
        "of the base is not what this patch was made on": tiny_model(seed=4),
        "of the base is not what": model,
        "The base lacks the weights of": {},
    }
    for message, base in cases.items():
        with pytest.raises(PatchError, match=message):
            loaded.revert(model, base=base)
        assert_same_state(edited, state_of(model))
    make(model, 5)
    changed = state_of(model)
    with pytest.raises(PatchError, match="was changed after this patch"):
        loaded.revert(model, base=tiny_model())
    assert_same_state(changed, state_of(model))


@KINDS
def test_damaged_originals(make: Maker, tmp_path: Path) -> None:
    model = tiny_model()
    loaded = reloaded(make(model), tmp_path, keep_originals=True)
    edited = state_of(model)
    table = loaded.flips if make is tensors else loaded.flips[2]
    key = list(table)[-1]
    whole = table[key]
    for damaged in (whole[:-3], torch.zeros(5, dtype=torch.uint8), table[next(iter(table))]):
        table[key] = damaged
        with pytest.raises(PatchError, match=r"damaged|originals|not what this patch was made on"):
            loaded.revert(model)
        assert_same_state(edited, state_of(model))
    fresh = tiny_model()
    before = state_of(fresh)
    if make is weights:
        with pytest.raises(PatchError, match="damaged"):
            loaded.apply(fresh)
        assert_same_state(before, state_of(fresh))


@KINDS
def test_originals_are_kept_only_where_they_are_known(make: Maker, tmp_path: Path) -> None:
    model = tiny_model()
    patch = make(model)
    patch.revert(model)
    with pytest.raises(PatchError, match="keep_originals needs a patch that is applied"):
        patch.save(tmp_path / "p.safetensors", keep_originals=True)
    assert not list(tmp_path.iterdir())
    patch.apply(model)
    first = reloaded(patch, tmp_path, keep_originals=True)
    again = reloaded(first, tmp_path, keep_originals=True, name="again")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "p.safetensors").read_bytes()
    assert not reloaded(again, tmp_path, name="without").flips


def test_originals_of_weights_that_changed_since_are_not_kept(tmp_path: Path) -> None:
    model = tiny_model()
    patch = write(model)
    write(model, seed=3)
    with pytest.raises(PatchError, match="was changed after this patch"):
        patch.save(tmp_path / "p.safetensors", keep_originals=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", [Exception, KeyboardInterrupt])
def test_turning_bits_is_all_or_none(fails: type[BaseException], tmp_path: Path, monkeypatch: Any) -> None:
    model = tiny_model("gpt_oss", dtype=torch.bfloat16)
    before = state_of(model)
    loaded = reloaded(write(model), tmp_path, keep_originals=True)
    loaded.revert(model)
    plain, calls = PatchWriter.keep, []

    def keep(self: PatchWriter, *args: Any) -> None:
        plain(self, *args)
        calls.append(args)
        if len(calls) == 2:
            raise fails

    monkeypatch.setattr(PatchWriter, "keep", keep)
    with pytest.raises(fails):
        loaded.apply(model)
    assert_same_state(before, state_of(model))


# ---------------------------------------------------------------- squared norms


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_reports_have_the_norms_of_each_expert(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    start, model = tiny_model(family, dtype=dtype), tiny_model(family, dtype=dtype)
    view = MoELayerView(start)
    for report in reloaded(write(model, experts=(0, 1, 6)), tmp_path).reports:
        experts = view.layers[report.layer].experts
        dense = update_for(view, report.layer, experts=(0, 1, 6)).dense(8)
        assert sorted(report.update_squared) == sorted(report.weight_squared) == [0, 1, 6]
        for expert in (0, 1, 6):
            assert report.update_squared[expert] == pytest.approx(float(dense[expert].norm() ** 2), rel=1e-4)
            assert report.weight_squared[expert] == pytest.approx(
                float(experts.read(expert).double().norm() ** 2), rel=1e-4
            )


def test_a_patch_of_several_writes_begins_before_the_first() -> None:
    model = tiny_model()
    view = MoELayerView(model)
    start = weights_fingerprint(view)
    with writing(view) as writer:
        for seed in range(3):
            writer.write(1, update_for(view, 1, seed=seed))
        patch = writer.finish({}, model_fingerprint(view))
    assert patch.base == start
    assert patch.before == write(tiny_model(), [1]).before
