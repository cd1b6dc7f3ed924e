"""Patches that hold Tucker cores: written a few experts at a time, saved, joined, and as small as they should be."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from solving_editors import TOK, hparams
from tiny import CONFIGS, assert_same_state, randomise, requests, state_of, tiny_model
from torch import Tensor, nn

from benchmarks.harness import peak_of
from easyedit_moe.algebra.core import FactoredCore
from easyedit_moe.algebra.core_update import CoreUpdate, TuckerFactors
from easyedit_moe.algebra.metric import IdentityMetric
from easyedit_moe.checkpoints.apply import apply_patch
from easyedit_moe.editor import MoEEditor
from easyedit_moe.errors import PatchError
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.loading import load_model
from easyedit_moe.patches.inspection import relative_sizes
from easyedit_moe.patches.merging import folded, merge_weights, revert_run
from easyedit_moe.patches.steps import FACTORS
from easyedit_moe.patches.weights import WeightPatch, writing
from easyedit_moe.serving.factors import layer_factors
from easyedit_moe.storage.tensors import read_safetensors, write_safetensors

FAMILIES = ["qwen3_moe", "gpt_oss", "modulelist"]
RANKS = {"rank_expert": 4, "rank_out": 16, "rank_in": 12}

pytestmark = pytest.mark.usefixtures("no_editing_warnings")


def editor_of(data: Path, model: nn.Module, **changes: Any) -> MoEEditor:
    values = {"spread": "residual", "v_num_grad_steps": 1, **RANKS, **changes}
    return MoEEditor(hparams(data, "MoTE", **values), model, TOK)


def run_of(data: Path, model: nn.Module, count: int, **changes: Any) -> list[WeightPatch]:
    """Batches of five edits one after the other; the same prompts, again and again to other targets."""
    editor = editor_of(data, model, **changes)
    for number in range(count):
        target = ["Paris", "Rome", "Leiden", "Polish"][number % 4]
        facts = [{**fact, "target_new": target} for fact in requests(5)]
        editor.batch_edit(requests=facts, sequential_edit=True, verbose=False)
    return [patch for patch in editor.patches if isinstance(patch, WeightPatch)]


def tensors_in(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def written(model: nn.Module, steps: list[tuple[int, Any]]) -> WeightPatch:
    view = MoELayerView(model)
    with writing(view) as writer:
        for layer, update in steps:
            writer.write(layer, update)
        return writer.finish({}, model_fingerprint(view))


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize("spread", ["update", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_core_writes_the_bits_of_its_expanded_form(
    family: str, dtype: torch.dtype, spread: str, data: Path, tmp_path: Path
) -> None:
    model, other = (tiny_model(family, dtype=dtype) for _ in range(2))
    before = state_of(model)
    editor = editor_of(data, model, spread=spread, dtype=str(dtype).removeprefix("torch."))
    editor.batch_edit(requests=requests(3), sequential_edit=True, verbose=False)
    (patch,) = editor.patches
    assert all(isinstance(update, CoreUpdate) for _, update in patch.steps)
    expanded = written(other, [(layer, update.expanded()) for layer, update in patch.steps])
    assert_same_state(state_of(model), state_of(other))
    assert (expanded.before, expanded.after, expanded.id) == (patch.before, patch.after, patch.id)
    for wanted, found in zip(expanded.reports, patch.reports, strict=True):
        assert found == wanted
    patch.save(tmp_path / "p.safetensors", keep_originals=True)
    patch.revert(model)
    assert_same_state(before, state_of(model))
    patch.apply(model)
    assert_same_state(state_of(other), state_of(model))
    assert patch.written == patch.after
    patch.revert(model)
    loaded = WeightPatch.load(tmp_path / "p.safetensors")
    loaded.apply(model)
    assert_same_state(state_of(other), state_of(model))
    WeightPatch.load(tmp_path / "p.safetensors").revert(model)
    assert_same_state(before, state_of(model))


def test_cores_of_a_run_lie_in_a_file_as_cores(data: Path, tmp_path: Path) -> None:
    """From the very edit at which they are smaller, and once per layer what all have in common."""
    model, path = tiny_model(), tmp_path / "p.safetensors"
    patches = run_of(data, model, 4)
    edited = state_of(model)
    few, many = merge_weights(patches[:1]), merge_weights(patches)
    few.save(path)
    assert not any(name.startswith(FACTORS) for name in tensors_in(path))
    many.save(path)
    names = tensors_in(path)
    assert {name.split(".")[1] for name in names if name.startswith(FACTORS)} == {"0", "1"}
    assert sum(name.endswith(".inner") and not name.startswith(FACTORS) for name in names) == 8
    assert not any(name.endswith(".source") for name in names)
    loaded = WeightPatch.load(path)
    assert len({id(update.factors) for _, update in loaded.steps}) == 2
    assert loaded.id == many.id
    revert_run(patches, model)
    loaded.apply(model)
    assert_same_state(edited, state_of(model))
    loaded.save(tmp_path / "again.safetensors")
    assert tensors_in(tmp_path / "again.safetensors") == names
    loaded.revert(model)
    assert_same_state(state_of(tiny_model()), state_of(model))


def test_layers_that_share_a_core_write_it_once(data: Path, tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "p.safetensors"
    patches = run_of(data, model, 4, spread="update")
    merged = merge_weights(patches)
    merged.save(path)
    names = tensors_in(path)
    assert sum(name.endswith(".same") for name in names) == 4
    assert not any(name.endswith(".source") for name in names)
    edited = state_of(model)
    revert_run(patches, model)
    WeightPatch.load(path).apply(model)
    assert_same_state(edited, state_of(model))


def test_patches_of_other_files_share_equal_factors(data: Path, tmp_path: Path) -> None:
    model = tiny_model()
    patches = run_of(data, model, 8)
    edited, halves = state_of(model), []
    for number, half in enumerate((patches[:4], patches[4:])):
        merge_weights(half).save(tmp_path / f"{number}.safetensors")
        halves.append(WeightPatch.load(tmp_path / f"{number}.safetensors"))
    joined = merge_weights(halves)
    assert len({id(update.factors) for _, update in joined.steps}) == 2
    revert_run(patches, model)
    joined.apply(model)
    assert_same_state(edited, state_of(model))


def test_into_a_checkpoint_and_out_again(data: Path, tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    patches = run_of(data, model, 4, dtype="bfloat16")
    merge_weights(patches).save(tmp_path / "p.safetensors")
    out = apply_patch(WeightPatch.load(tmp_path / "p.safetensors"), tmp_path / "source", tmp_path / "out")
    assert out == tmp_path / "out"
    TOK.save_pretrained(out)
    weights = dict(load_model(str(out), "bfloat16")[0].named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


# ---------------------------------------------------------------- folding, looking, serving


def test_a_run_of_cores_folds_into_one_core_per_layer(data: Path) -> None:
    model = tiny_model()
    patches = run_of(data, model, 6)
    whole = merge_weights(patches)
    small = folded(whole)
    assert [layer for layer, _ in small.steps] == [1, 2]
    for layer, update in small.steps:
        assert isinstance(update, CoreUpdate)
        assert update.rank <= RANKS["rank_out"]
        wanted = sum(step.expanded().to(dtype=torch.float64).dense(8) for n, step in whole.steps if n == layer)
        torch.testing.assert_close(update.dense(8).double(), wanted, rtol=1e-4, atol=1e-6)
    edited = state_of(model)
    revert_run(patches, model)
    small.apply(model)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(edited["parameters"][name], weight, rtol=0, atol=1e-5)


def test_what_is_read_of_a_core_is_what_is_read_of_its_expanded_form(data: Path) -> None:
    model, other = tiny_model(), tiny_model()
    (patch,) = run_of(data, model, 1)
    expanded = written(other, [(layer, update.expanded()) for layer, update in patch.steps])
    assert relative_sizes(patch) == relative_sizes(expanded)
    for found, wanted in zip(layer_factors(patch), layer_factors(expanded), strict=True):
        assert (found.layer, found.exact_rank, found.loss) == (wanted.layer, wanted.exact_rank, wanted.loss)
        for expert, factors in wanted.experts.items():
            assert all(map(torch.equal, found.experts[expert], factors))


# ---------------------------------------------------------------- files


def test_files_of_earlier_schemas_hold_no_cores(data: Path, tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "p.safetensors"
    patches = run_of(data, model, 4)
    edited, few, many = state_of(model), merge_weights(patches[:1]), merge_weights(patches)
    for patch, fine in ((few, True), (many, False)):
        patch.save(path)
        tensors, metadata = read_safetensors(path, PatchError, "")
        assert metadata["schema"] == 4
        write_safetensors(path, tensors, {**metadata, "schema": 3})
        if fine:
            assert WeightPatch.load(path).id == patch.id
        else:
            with pytest.raises(PatchError, match="of schema 3 and holds a core"):
                WeightPatch.load(path)
    assert_same_state(edited, state_of(model))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"2.factors": torch.tensor([7])}, "lacks the tensor factors.7"),
        ({"2.factors": torch.tensor([0.5])}, r"2.factors is"),
        ({"2.tokens": torch.full((5, 3), 8)}, "names experts that it does not hold"),
        ({"2.of": torch.tensor([5])}, "is of the factors 5, which it does not hold"),
        ({"2.same": torch.tensor([5])}, "holds the unknown tensor 2."),
        ({"factors.0.sizes": torch.tensor([30] + [0] * 7)}, "not as wide as their sizes say"),
        ({"factors.1.complement": torch.ones(7, dtype=torch.bool)}, "factors.1.complement is"),
        ({"2.inner": torch.full((5, 3, 12), torch.nan)}, "non-finite"),
    ],
)
def test_damaged_cores_are_refused(change: dict[str, Tensor], told: str, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    merge_weights(run_of(data, tiny_model(), 4)).save(path)
    tensors, metadata = read_safetensors(path, PatchError, "")
    write_safetensors(path, {**tensors, **change}, metadata)
    with pytest.raises(PatchError, match=told):
        WeightPatch.load(path)


def test_a_core_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "p.safetensors"
    core = torch.randn(2, 2, 2) * 0.01
    factors = TuckerFactors(torch.randn(8, 2), torch.randn(24, 2), torch.randn(32, 2), IdentityMetric())
    patch = written(model, [(1, CoreUpdate(core, factors))])
    patch.save(path)
    tensors, metadata = read_safetensors(path, PatchError, "")
    assert "0.core" in tensors
    write_safetensors(path, {**tensors, "factors.0.expert": torch.randn(7, 2)}, metadata)
    with pytest.raises(PatchError, match="core of 7 experts, but layer 1 has another number"):
        WeightPatch.load(path)


# ---------------------------------------------------------------- memory


def wide_model(experts: int = 32, d_model: int = 256) -> nn.Module:
    config = CONFIGS["qwen3_moe"]()
    config.hidden_size, config.moe_intermediate_size, config.head_dim, config.num_hidden_layers = d_model, 96, 8, 2
    config.num_experts = experts
    model = hf.AutoModelForCausalLM.from_config(config)
    randomise(model)
    model.set_experts_implementation("eager")
    return model.eval()


def own_bytes(patch: WeightPatch) -> int:
    """Of the tensors that the patch's steps hold beside what their layers have in common."""
    found: dict[int, int] = {}
    for _, update in patch.steps:
        parts = (update.core.left, update.core.inner, update.core.expert, update.core.u_expert)
        for tensor in parts:
            if tensor is not update.factors.expert:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.parametrize("remember", [False, True])
def test_an_edit_holds_its_core_and_not_a_factor_of_every_expert(remember: bool, data: Path) -> None:
    e, d, h, re, ro, ri = 32, 256, 96, 8, 64, 24
    changes = {"layers": [1], "remember_edits": remember, "rank_expert": re, "rank_out": ro, "rank_in": ri}
    patches = run_of(data, wide_model(), 4, **changes)
    for patch in patches:
        assert isinstance(patch.steps[0][1].core, FactoredCore)
        # phi of five tokens by directions, their coefficients, and what indexes them
        assert own_bytes(patch) <= 4 * (5 * (re * ri + ro) + re * re) + 8 * 5 * re
        assert own_bytes(patch) < 4 * 5 * (e * h + d) / 10
    assert len({id(patch.steps[0][1].factors) for patch in patches}) == 1


def application_peaks() -> dict[str, int]:
    """Bytes at the peak of writing one update, as a core and expanded, and those of all experts' factors."""
    model = wide_model(512, 64)
    draw, tokens, (e, d, h) = torch.Generator().manual_seed(0), 64, (512, 64, 96)
    parts = [torch.randn(n, r, generator=draw) for n, r in ((e, 8), (h, 64), (d, 64))]
    factors = TuckerFactors(*parts, IdentityMetric())
    core = FactoredCore(
        torch.randn(64, tokens, generator=draw) * 1e-4, torch.randint(e, (tokens, 3), generator=draw),
        torch.randn(tokens, 3, 64, generator=draw), factors.expert,
    )  # fmt: skip
    update, view, found = CoreUpdate(core, factors), MoELayerView(model), {"factors": 4 * e * h * tokens}
    for name in ("warm-up", "core", "expanded"):
        with writing(view) as writer:
            writer.keep(1, range(e))
            gc.collect()
            make = update.expanded if name == "expanded" else lambda: update
            found[name] = peak_of(lambda w=writer, m=make: w.write(1, m()))[1]
    return found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can only be reset on Linux")
def test_an_application_never_holds_the_factors_of_all_experts() -> None:
    """In a process of its own, whose allocator gives freed tensors back instead of reusing them unseen."""
    here = Path(__file__).parent
    folders = [str(here), str(here.parent), str(here.parents[1])]
    code = (
        f"import sys; sys.path[:0] = {folders!r}; import torch; torch.set_num_threads(1)\n"
        "import json, test_cores\nprint(json.dumps(test_cores.application_peaks()))"
    )
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    found = json.loads(done.stdout)
    assert found["factors"] > 12e6
    assert found["expanded"] > found["core"] + 0.7 * found["factors"]
