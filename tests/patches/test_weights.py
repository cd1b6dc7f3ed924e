from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_patches import EXPERTS, update_for, write
from safetensors.torch import save_file
from tiny import FAMILIES, assert_same_state, state_of, tiny_model
from torch import Tensor, nn

from easyedit_moe.algebra.routed_keys import FactoredUpdate
from easyedit_moe.errors import NumericalError, PatchError
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches import checks, groups
from easyedit_moe.patches.weights import PatchWriter, WeightPatch, restore, writing
from easyedit_moe.storage.tensors import write_safetensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def raw_weights(model: nn.Module, family: str, layer: int) -> Tensor:
    """``W [E, d, h]`` of one layer read from the parameters by hand, whatever the package thinks of the layout."""
    module = model.model.layers[layer]
    if family == "modulelist":
        return torch.stack([expert.down_proj.weight.detach() for expert in module.mlp.experts])
    experts = next(m for n, m in module.named_modules() if n.endswith("experts") and hasattr(m, "down_proj"))
    weights = experts.down_proj.detach().clone()
    return weights.transpose(1, 2) if family == "gpt_oss" else weights


def write_all(view: MoELayerView, updates: Sequence[tuple[int, FactoredUpdate]]) -> None:
    with writing(view) as writer:
        for layer, update in updates:
            writer.write(layer, update)


# ---------------------------------------------------------------- write and revert


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_write_and_revert(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    before = state_of(model)
    old = {layer: raw_weights(model, family, layer) for layer in (1, 2, 3)}
    patch = write(model, (1, 2))
    assert patch.layers == [1, 2]
    view = MoELayerView(model)
    for layer in (1, 2):
        change = update_for(view, layer).to(dtype=torch.float32).dense(8).double()
        # A sum as exact as float32's, whether or not a CPU fuses its steps, rounded once, which keeps order.
        exact, error = old[layer].double() + change, 2e-7 * (old[layer].double().abs() + change.abs())
        new = raw_weights(model, family, layer)
        assert ((exact - error).to(dtype) <= new).all()
        assert (new <= (exact + error).to(dtype)).all()
        # Experts without an update keep every bit.
        untouched = [j for j in range(8) if j not in EXPERTS]
        assert torch.equal(raw_weights(model, family, layer)[untouched], old[layer][untouched])
        assert not torch.equal(raw_weights(model, family, layer)[list(EXPERTS)], old[layer][list(EXPERTS)])
    assert torch.equal(raw_weights(model, family, 3), old[3])
    names = {name for layer in (1, 2) for name in view.layers[layer].parameter_names()}
    after = dict(model.named_parameters())
    assert {n for n, p in before["parameters"].items() if not torch.equal(p, after[n])} <= names
    patch.revert(model)
    assert_same_state(before, state_of(model))


def test_addition_is_not_done_in_the_parameters_dtype() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    old = raw_weights(model, "qwen3_moe", 1)
    write(model, [1])
    change = update_for(MoELayerView(model), 1).dense(8)
    new = raw_weights(model, "qwen3_moe", 1)
    rounded_twice = old + change.to(torch.bfloat16)
    assert not torch.equal(new, rounded_twice)
    exact = old.double() + change
    assert (new.double() - exact).norm() < (rounded_twice.double() - exact).norm()


def test_several_writes_to_one_layer_revert_to_the_start() -> None:
    model = tiny_model("gpt_oss", dtype=torch.bfloat16)
    before, view = state_of(model), MoELayerView(model)
    with writing(view) as writer:
        for seed, experts in enumerate([(0, 1), (1, 2), (0, 7)]):
            writer.write(1, update_for(view, 1, seed=seed, experts=experts))
        patch = writer.finish({}, "f")
    assert sorted(patch.originals[1]) == [0, 1, 2, 7]
    assert len(patch.steps) == len(patch.reports) == 3
    patch.revert(model)
    assert_same_state(before, state_of(model))


# ---------------------------------------------------------------- reports


@pytest.mark.parametrize("scale", [0.02, 1e-5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
def test_rounding_loss_is_measured(family: str, dtype: torch.dtype, scale: float) -> None:
    model = tiny_model(family, dtype=dtype)
    old = raw_weights(model, family, 1).double()
    (report,) = write(model, [1], scale=scale).reports
    intended = update_for(MoELayerView(model), 1, scale).dense(8)
    applied = raw_weights(model, family, 1).double() - old
    loss = float((applied - intended).norm() / intended.norm())
    assert (report.layer, report.experts) == (1, 3)
    assert report.update_norm == pytest.approx(float(intended.norm()), rel=1e-5)
    assert report.rounding_loss == pytest.approx(loss, rel=1e-2, abs=1e-6)
    if dtype == torch.float32:
        assert loss < 2e-3
    if dtype == torch.bfloat16:
        assert loss > (1e-3 if scale == 0.02 else 0.3)


def test_an_update_that_rounding_swallows_is_reported_as_lost() -> None:
    (report,) = write(tiny_model(dtype=torch.bfloat16), [1], scale=1e-9).reports
    assert report.rounding_loss > 0.99


# ---------------------------------------------------------------- all or none


class Trouble(Exception):
    pass


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
def test_an_exception_after_the_first_layer_undoes_it(family: str, error: type[BaseException]) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    before, view = state_of(model), MoELayerView(model)
    old = raw_weights(model, family, 1)

    def fail_half_way() -> None:
        with writing(view) as writer:
            writer.write(1, update_for(view, 1))
            assert not torch.equal(raw_weights(model, family, 1), old)
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("where", ["left", "right"])
def test_an_update_that_is_not_finite(where: str) -> None:
    model = tiny_model()
    before, view = state_of(model), MoELayerView(model)
    bad = update_for(view, 2)
    (bad.left if where == "left" else bad.right[1])[3, 0] = float("nan")
    with pytest.raises(NumericalError, match="layer 2 holds NaN"):
        write_all(view, [(1, update_for(view, 1)), (2, bad)])
    assert_same_state(before, state_of(model))


def test_half_precision_overflow_in_the_last_expert() -> None:
    model = tiny_model(dtype=torch.float16)
    before, view = state_of(model), MoELayerView(model)
    bad = update_for(view, 2)
    bad.right[2][:] = 1e9
    with pytest.raises(NumericalError, match=r"Expert 6 of layer 2 would become NaN or infinite in torch\.float16"):
        write_all(view, [(1, update_for(view, 1)), (2, bad)])
    assert_same_state(before, state_of(model))
    write(tiny_model(dtype=torch.bfloat16), [1], scale=1e6)


def test_float32_overflow() -> None:
    model = tiny_model()
    before, view = state_of(model), MoELayerView(model)
    for scale in (1e60, 3e38):
        with pytest.raises(NumericalError):
            write_all(view, [(1, update_for(view, 1, scale=scale))])
    assert_same_state(before, state_of(model))


def test_provenance_must_be_json_and_a_failure_there_undoes_the_writes() -> None:
    model = tiny_model()
    before, view = state_of(model), MoELayerView(model)

    def finish_badly() -> None:
        with writing(view) as writer:
            writer.write(1, update_for(view, 1))
            writer.finish({"bad": object()}, "f")

    with pytest.raises(TypeError):
        finish_badly()
    assert_same_state(before, state_of(model))


def test_applying_is_all_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_model()
    before, patch = state_of(model), write(model)
    patch.revert(model)
    plain, calls = PatchWriter.write, []

    def second_fails(self: PatchWriter, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise Trouble
        return plain(self, *args)

    monkeypatch.setattr(PatchWriter, "write", second_fails)
    with pytest.raises(Trouble):
        patch.apply(model)
    assert_same_state(before, state_of(model))
    monkeypatch.undo()
    patch.apply(model)
    patch.revert(model)
    assert_same_state(before, state_of(model))


# ---------------------------------------------------------------- save and load


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist", "granitemoe"])
def test_a_loaded_patch_writes_the_same_bits(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, model = tiny_model(family, dtype=dtype), tiny_model(family, dtype=dtype)
    before = state_of(base)
    made = write(model)
    made.save(tmp_path / "folder" / "p.safetensors")
    loaded = WeightPatch.load(str(tmp_path / "folder" / "p.safetensors"))
    assert not loaded.originals
    reports = loaded.apply(base)
    assert_same_state(state_of(model), state_of(base))
    assert reports == made.reports == loaded.reports
    loaded.revert(base)
    assert_same_state(before, state_of(base))


def test_a_file_explains_itself(tmp_path: Path) -> None:
    patch = write(tiny_model())
    patch.save(tmp_path / "p.safetensors")
    loaded = WeightPatch.load(tmp_path / "p.safetensors")
    assert loaded.metadata == patch.metadata
    assert loaded.metadata["note"] == "test"
    assert set(loaded.metadata["versions"]) == {"easyedit_moe", "torch", "transformers", "python"}
    assert (loaded.fingerprint, loaded.layers) == (patch.fingerprint, [1, 2])
    for (_, a), (_, b) in zip(patch.steps, loaded.steps, strict=True):
        assert a.left.dtype == torch.float32
        assert torch.equal(a.dense(8), b.dense(8))


def test_a_reverted_patch_can_be_saved_and_applied_again(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    patch = write(model)
    edited = state_of(model)
    patch.revert(model)
    patch.save(tmp_path / "p.safetensors")
    patch.apply(model)
    assert_same_state(edited, state_of(model))
    patch.revert(model)
    WeightPatch.load(tmp_path / "p.safetensors").apply(model)
    assert_same_state(edited, state_of(model))


def test_shared_factors_can_be_saved(tmp_path: Path) -> None:
    model = tiny_model()
    view = MoELayerView(model)
    shared = update_for(view, 1).to(dtype=torch.float32)
    with writing(view) as writer:
        writer.write(1, shared)
        writer.write(2, shared)
        patch = writer.finish({}, model_fingerprint(view))
    patch.save(tmp_path / "p.safetensors")
    assert torch.equal(WeightPatch.load(tmp_path / "p.safetensors").steps[1][1].left, shared.left)


@pytest.mark.parametrize(
    "other",
    [
        lambda: tiny_model(seed=1),
        lambda: tiny_model(dtype=torch.bfloat16),
        lambda: tiny_model("olmoe"),
        lambda: tiny_model("modulelist"),
    ],
)
def test_a_patch_of_another_model_is_refused(other: Any, tmp_path: Path) -> None:
    write(tiny_model()).save(tmp_path / "p.safetensors")
    model = other()
    before = state_of(model)
    with pytest.raises(PatchError, match="made for another model: expected fingerprint"):
        WeightPatch.load(tmp_path / "p.safetensors").apply(model)
    assert_same_state(before, state_of(model))


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(PatchError, match="does not exist"):
        WeightPatch.load(path)
    write(tiny_model()).save(path)
    whole = path.read_bytes()
    for broken in (whole[:-5], whole[:50], b"", b"nonsense" * 40):
        path.write_bytes(broken)
        with pytest.raises(PatchError, match="truncated, corrupt or not of this package"):
            WeightPatch.load(path)
        assert path.read_bytes() == broken
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(PatchError, match="not of this package"):
        WeightPatch.load(path)
    write_safetensors(path, {"x": torch.zeros(2)}, {"kind": "moments", "schema": 1})
    with pytest.raises(PatchError, match="is not a patch of schema 2"):
        WeightPatch.load(path)
    write_safetensors(path, {"x": torch.zeros(2)}, {"kind": "patch", "schema": 1})
    with pytest.raises(PatchError, match="is not a patch of schema 2"):
        WeightPatch.load(path)
    write_safetensors(path, {"x": torch.zeros(2)}, {"kind": "patch", "schema": 2, "layers": [1]})
    with pytest.raises(PatchError, match="is damaged: its content lacks id"):
        WeightPatch.load(path)


def test_a_patch_whose_shapes_do_not_fit() -> None:
    model = tiny_model()
    patch = write(model)
    patch.revert(model)
    layer, update = patch.steps[1]
    before = state_of(model)
    for wrong in (
        FactoredUpdate(update.left[:-1], update.experts, update.columns, update.right),
        FactoredUpdate(update.left, update.experts, update.columns, tuple(r[:-1] for r in update.right)),
        FactoredUpdate(update.left, (0, 3, 8), update.columns, update.right),
    ):
        patch.steps[1] = (layer, wrong)
        with pytest.raises(PatchError, match="Layer 2 has 8 experts of 32 x 24; the patch holds"):
            patch.apply(model)
        assert_same_state(before, state_of(model))


# ---------------------------------------------------------------- order of applying and reverting


def test_reverting_or_applying_twice() -> None:
    model = tiny_model()
    patch = write(model)
    with pytest.raises(PatchError, match="already applied"):
        patch.apply(model)
    patch.revert(model)
    before = state_of(model)
    with pytest.raises(PatchError, match="not applied"):
        patch.revert(model)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
def test_reverting_after_a_later_change(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    start = state_of(model)
    first = write(model, seed=0)
    middle = state_of(model)
    second = write(model, (2, 3), seed=1)
    changed = state_of(model)
    with pytest.raises(PatchError, match=r"Layer 2, expert 0 was changed after .* revert the later patch first"):
        first.revert(model)
    assert_same_state(changed, state_of(model))
    second.revert(model)
    assert_same_state(middle, state_of(model))
    first.revert(model)
    assert_same_state(start, state_of(model))


def test_one_bit_is_a_change_but_other_experts_are_free() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    patch = write(model)
    weight = model.model.layers[2].mlp.experts.down_proj
    with torch.no_grad():
        weight[1] += 1
        weight[6].view(torch.int16)[5, 5] ^= 1
        with pytest.raises(PatchError, match="Layer 2, expert 6 was changed"):
            patch.revert(model)
        weight[6].view(torch.int16)[5, 5] ^= 1
        weight[6, [0, 1]] = weight[6, [1, 0]]
        with pytest.raises(PatchError, match="Layer 2, expert 6 was changed"):
            patch.revert(model)
        weight[6, [0, 1]] = weight[6, [1, 0]]
    patch.revert(model)


def test_reverting_on_a_model_without_that_layer() -> None:
    patch = write(tiny_model("qwen3_moe"), (1, 2))
    other = tiny_model("deepseek_v3")
    before = state_of(other)
    with pytest.raises(PatchError):
        patch.revert(other)
    for table in (patch.originals, patch.written, patch.before):
        table[0] = table.pop(1)
    with pytest.raises(PatchError, match="layer 0"):
        patch.revert(other)
    assert_same_state(before, state_of(other))


def test_concat_reverts_all() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    start = state_of(model)
    first, second = write(model, (1, 2), seed=0), write(model, (2, 3), seed=1, experts=(3, 4))
    edited = state_of(model)
    both = WeightPatch.concat([first, second])
    assert both.layers == [1, 2, 3]
    assert sorted(both.originals[2]) == [0, 3, 4, 6]
    assert len(both.reports) == 4
    both.revert(model)
    assert_same_state(start, state_of(model))
    with pytest.raises(PatchError):
        second.revert(model)
    both.apply(model)
    assert_same_state(edited, state_of(model))


def test_concat_in_the_wrong_order_does_not_restore_wrong_weights() -> None:
    model = tiny_model()
    first, second = write(model, seed=0), write(model, seed=1)
    edited = state_of(model)
    with pytest.raises(PatchError, match="the order is wrong"):
        WeightPatch.concat([second, first])
    assert_same_state(edited, state_of(model))


def test_concat_can_be_saved(tmp_path: Path) -> None:
    base, model = tiny_model(dtype=torch.bfloat16), tiny_model(dtype=torch.bfloat16)
    both = WeightPatch.concat([write(model, seed=0), write(model, seed=1)])
    both.save(tmp_path / "p.safetensors")
    WeightPatch.load(tmp_path / "p.safetensors").apply(base)
    assert_same_state(state_of(model), state_of(base))
    assert [part["note"] for part in both.metadata["parts"]] == ["test", "test"]


def test_concat_refuses_what_it_cannot_undo() -> None:
    model = tiny_model()
    first = write(model)
    with pytest.raises(PatchError, match="at least one patch"):
        WeightPatch.concat([])
    with pytest.raises(PatchError, match="of the same model"):
        WeightPatch.concat([first, write(tiny_model(seed=1))])
    first.revert(model)
    with pytest.raises(PatchError, match="Some of these patches are applied and some are not"):
        WeightPatch.concat([write(model), first])


# ---------------------------------------------------------------- EasyEdit's way of restoring


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist", "qwen3_5_moe"])
def test_weights_copy_restores_as_easyedit_does(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    before = state_of(model)
    patch = write(model)
    copied = patch.weights_copy(model)
    view = MoELayerView(model)
    names = {n for layer in (1, 2) for n in view.layers[layer].parameter_names()}
    if family == "modulelist":
        names = {n for n in names if int(n.split(".experts.")[1].split(".")[0]) in EXPERTS}
    assert set(copied) == names
    parameters = dict(model.named_parameters())
    for name, tensor in copied.items():
        assert (tensor.shape, tensor.dtype) == (parameters[name].shape, parameters[name].dtype)
        assert torch.equal(tensor, before["parameters"][name])
        assert tensor.data_ptr() != parameters[name].data_ptr()
    with torch.no_grad():
        for name, tensor in copied.items():
            parameters[name][...] = tensor
    assert_same_state(before, state_of(model))


def test_weights_copy_clones_each_parameter_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    patch, clones, clone = write(model), [], Tensor.clone

    def counting(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        clones.append(self.shape)
        return clone(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "clone", counting)
    patch.weights_copy(model)
    assert len(clones) == 2


def test_weights_copy_of_the_first_of_two_patches_keeps_the_second() -> None:
    model = tiny_model()
    first = write(model, [1], experts=(0, 1))
    write(model, [1], experts=(4, 5), seed=1)
    now = model.model.layers[1].mlp.experts.down_proj.detach().clone()
    (copied,) = first.weights_copy(model).values()
    assert torch.equal(copied[[4, 5]], now[[4, 5]])
    assert torch.equal(copied[[0, 1]], tiny_model().model.layers[1].mlp.experts.down_proj[[0, 1]])


# ---------------------------------------------------------------- pieces


def test_restore_and_metadata() -> None:
    model = tiny_model()
    before, patch = state_of(model), write(model)
    assert json.dumps(patch.metadata)
    restore(MoELayerView(model), patch.originals)
    assert_same_state(before, state_of(model))
    assert checks.versions()["torch"] == torch.__version__


# ---------------------------------------------------------------- grouped writes


@pytest.mark.parametrize("tile", [1, 700, 10**9], ids=["one row", "a few rows", "all experts"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_change_nothing(family: str, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(groups._TILE, "cpu", tile)
    model = tiny_model(family, dtype=dtype)
    state, view = state_of(model), MoELayerView(model)
    before = raw_weights(model, family, 1).double()
    update = update_for(view, 1, experts=(0, 1, 2, 5, 7))
    with writing(view) as writer:
        report = writer.write(1, update)
        patch = writer.finish({}, model_fingerprint(view))
    delta = update.to(dtype=torch.float32).to(dtype=torch.float64).dense(len(before))
    after = raw_weights(model, family, 1).double()
    # Rounded once: within half a unit in the last place of the sum in float32.
    step = torch.finfo(dtype).eps
    assert ((after - before - delta).abs() <= 0.51 * step * after.abs() + 1e-6 * delta.abs() + 1e-8).all()
    assert torch.equal(after[[3, 4, 6]], before[[3, 4, 6]])
    loss = float((after - before - delta).norm() / delta.norm())
    assert report.rounding_loss == pytest.approx(loss, rel=1e-2, abs=2e-7)
    assert report.update_norm == pytest.approx(float(delta.norm()), rel=1e-6)
    assert report.experts == 5
    patch.revert(model)
    assert_same_state(state, state_of(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("after", [0, 2, 5])
def test_an_interruption_between_tiles_undoes_them(family: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(groups._TILE, "cpu", 64)
    model = tiny_model(family)
    before, view = state_of(model), MoELayerView(model)
    plain, calls = torch.bmm, []

    def interrupted(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return plain(*args, **options)

    monkeypatch.setattr(torch, "bmm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_all(view, [(1, update_for(view, 1))])
    assert len(calls) == after + 1
    assert_same_state(before, state_of(model))
