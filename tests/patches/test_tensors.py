from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planted_patches import new_values, some_names
from planted_patches import write_tensors as write
from safetensors.torch import save_file
from tiny import FAMILIES, assert_same_state, state_of, tiny_model
from torch import Tensor, nn

from easyedit_moe.errors import NumericalError, PatchError
from easyedit_moe.patches import tensors
from easyedit_moe.patches.tensors import TensorPatch, writing_tensors
from easyedit_moe.patches.weights import WeightPatch
from easyedit_moe.storage.tensors import write_safetensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("family", FAMILIES)
def test_write_and_revert_in_every_family(family: str) -> None:
    model = tiny_model(family)
    before, values = state_of(model), new_values(model)
    assert len(values) > 8
    patch = write(model, values)
    for name, value in values.items():
        assert torch.equal(model.get_parameter(name), value)
    assert patch.names == sorted(values)
    originals = patch.weights_copy(model)
    assert all(torch.equal(originals[n], before["parameters"][n]) for n in values)
    patch.revert(model)
    assert_same_state(before, state_of(model))
    assert patch.weights_copy(model) == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_rounded_once_and_the_loss_is_reported(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    before, values = state_of(model)["parameters"], new_values(model)
    patch = write(model, values)
    assert [r.name for r in patch.reports] == list(values)
    for report in patch.reports:
        value, start = values[report.name].double(), before[report.name].double()
        applied = model.get_parameter(report.name).detach()
        assert torch.equal(applied, values[report.name].to(dtype))
        lost = float((applied.double() - value).norm() / (value - start).norm())
        assert report.rounding_loss == pytest.approx(lost, rel=1e-3, abs=1e-9)
        assert report.update_norm == pytest.approx(float((value - start).norm()), rel=1e-4)
        assert (report.rounding_loss > 1e-4) == (dtype != torch.float32)
    patch.revert(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_patches_give_the_same_bits_on_another_copy(dtype: torch.dtype, tmp_path: Path) -> None:
    model, copy = tiny_model(dtype=dtype), tiny_model(dtype=dtype)
    untouched = state_of(copy)
    write(model, new_values(model)).save(tmp_path / "p.safetensors")
    patch = TensorPatch.load(tmp_path / "p.safetensors")
    assert patch.metadata["note"] == "test"
    assert patch.metadata["versions"]["torch"] == torch.__version__
    patch.apply(copy)
    assert_same_state(state_of(model), state_of(copy))
    with pytest.raises(PatchError, match="already applied"):
        patch.apply(copy)
    patch.revert(copy)
    assert_same_state(untouched, state_of(copy))
    patch.apply(copy)
    patch.restore(copy)
    assert_same_state(untouched, state_of(copy))


def test_patches_that_follow_each_other(tmp_path: Path) -> None:
    model, copy = tiny_model(), tiny_model()
    start, names = state_of(model), some_names(model)
    first = write(model, new_values(model, 1, names[:6]))
    middle = state_of(model)
    second = write(model, new_values(model, 2, names[3:]))
    end = state_of(model)
    with pytest.raises(PatchError, match="was changed after this patch"):
        first.revert(model)
    assert_same_state(end, state_of(model))
    for i, patch in enumerate((first, second)):
        patch.save(tmp_path / f"{i}.safetensors")
    loaded = [TensorPatch.load(tmp_path / f"{i}.safetensors") for i in range(2)]
    with pytest.raises(PatchError, match=r"apply earlier patches first|made for another model"):
        loaded[1].apply(copy)
    assert_same_state(start, state_of(copy))
    for patch in loaded:
        patch.apply(copy)
    assert_same_state(end, state_of(copy))
    second.revert(model)
    assert_same_state(middle, state_of(model))
    first.revert(model)
    assert_same_state(start, state_of(model))
    for patch in reversed(loaded):
        patch.restore(copy)
    assert_same_state(start, state_of(copy))


def test_order_matters_for_the_same_parameters(tmp_path: Path) -> None:
    """The fingerprint leaves out what a patch writes, so the checksums must see a missing earlier patch."""
    model, copy = tiny_model(), tiny_model()
    names = some_names(model)
    write(model, new_values(model, 1, names))
    second = write(model, new_values(model, 2, names))
    second.save(tmp_path / "p.safetensors")
    before = state_of(copy)
    with pytest.raises(PatchError, match="apply earlier patches first"):
        TensorPatch.load(tmp_path / "p.safetensors").apply(copy)
    assert_same_state(before, state_of(copy))


def test_only_what_changed_is_in_the_patch() -> None:
    model = tiny_model()
    names = some_names(model)
    values = new_values(model, 0, names[:3])
    values[names[0]] = model.get_parameter(names[0]).detach().clone()
    patch = write(model, values)
    assert patch.names == sorted(names[1:3])
    empty = write(model, {names[5]: model.get_parameter(names[5]).detach().clone()})
    assert empty.names == []
    before = state_of(model)
    empty.revert(model)
    empty.restore(model)
    assert_same_state(before, state_of(model))


def test_restore_whatever_happened_since() -> None:
    model = tiny_model()
    before = state_of(model)
    patch = write(model, new_values(model))
    with torch.no_grad():
        model.get_parameter(patch.names[0]).zero_()
    with pytest.raises(PatchError, match="was changed after this patch"):
        patch.revert(model)
    patch.restore(model)
    assert_same_state(before, state_of(model))
    with pytest.raises(PatchError, match="not applied"):
        patch.revert(model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, NumericalError, RuntimeError])
def test_all_or_nothing(error: type[BaseException]) -> None:
    model = tiny_model()
    before, names = state_of(model), some_names(model)

    def failing() -> None:
        with writing_tensors(model) as writer:
            writer.keep(names[0])
            with torch.no_grad():
                model.get_parameter(names[0]).zero_()
            writer.write(names[1], new_values(model)[names[1]])
            raise error("planted")

    with pytest.raises(error, match="planted"):
        failing()
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize(("dtype", "bad"), [(torch.float32, float("nan")), (torch.float16, 1e6)])
def test_values_that_are_not_finite(dtype: torch.dtype, bad: float) -> None:
    model = tiny_model(dtype=dtype)
    before, values = state_of(model), new_values(model)
    values[list(values)[-1]].view(-1)[3] = bad
    with pytest.raises(NumericalError, match="would become NaN or infinite"):
        write(model, values)
    assert_same_state(before, state_of(model))


def test_an_apply_that_fails_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    before = state_of(model)
    patch = write(model, new_values(model))
    patch.revert(model)
    copy, calls = tensors._copy, []

    def failing(parameter: nn.Parameter, value: Tensor) -> None:
        copy(parameter, value)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(tensors, "_copy", failing)
    with pytest.raises(KeyboardInterrupt):
        patch.apply(model)
    assert_same_state(before, state_of(model))
    monkeypatch.setattr(tensors, "_copy", copy)
    patch.apply(model)
    patch.revert(model)
    assert_same_state(before, state_of(model))


def test_other_models_are_refused() -> None:
    model = tiny_model()
    patch = write(model, new_values(model))
    patch.revert(model)
    for other, message in (
        (tiny_model(seed=1), "made for another model"),
        (tiny_model(dtype=torch.bfloat16), "as .* of torch.float32; the model has .* of torch.bfloat16"),
        (tiny_model("qwen2_moe"), "the model has|made for another model"),
        (tiny_model("deepseek_v3"), "the model has nothing there"),
    ):
        before = state_of(other)
        with pytest.raises(PatchError, match=message):
            patch.apply(other)
        assert_same_state(before, state_of(other))
    patch.apply(model)
    with pytest.raises(PatchError, match="the model has nothing there"):
        patch.revert(tiny_model("deepseek_v3"))


def test_files_that_are_no_patch_of_tensors(tmp_path: Path) -> None:
    model = tiny_model()
    patch = write(model, new_values(model))
    path = tmp_path / "p.safetensors"
    patch.save(path)
    with pytest.raises(PatchError, match="is not a patch of schema"):
        WeightPatch.load(path)
    metadata = patch.described("tensor patch", patch.reports, {}, flips=False)
    damaged = {**patch.values, patch.names[0]: torch.zeros_like(patch.values[patch.names[0]])}
    cases = {
        "does not exist": lambda p: None,
        "truncated": lambda p: p.write_bytes(path.read_bytes()[:-9]),
        "is not a patch of tensors": lambda p: write_safetensors(p, patch.values, {"schema": 2, "kind": "patch"}),
        "not of this package": lambda p: save_file(patch.values, p),
        f"is damaged: {patch.names[0]} has another checksum": lambda p: write_safetensors(
            p, damaged, {**metadata, "before": patch.before, "after": patch.after}
        ),
        "is damaged": lambda p: write_safetensors(p, patch.values, {**metadata, "before": {}, "after": {}}),
    }
    for i, (message, make) in enumerate(cases.items()):
        make(tmp_path / f"{i}.safetensors")
        with pytest.raises(PatchError, match=message):
            TensorPatch.load(tmp_path / f"{i}.safetensors")
