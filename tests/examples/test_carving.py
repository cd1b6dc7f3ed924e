"""Carving a dense model into experts: nothing is lost where all experts count, and distilling comes nearer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.storage.strict_json import read_json
from tests.tiny import tiny_tokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "carve_moe.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("carve_moe", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["carve_moe"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def dense_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()), hidden_size=32, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def recipe(script: ModuleType, **changes: object) -> object:
    values = {"layers": (1, 2), "shared": 32, "experts": 4, "top_k": 2, "steps": 40, "batch_tokens": 64}
    return script.Recipe(**{**values, "texts": 8, "length": 24, "held_out": 4, **changes})


@pytest.mark.parametrize("experts", [2, 4, 8])
def test_with_equal_gates_for_all_experts_the_sum_is_the_dense_output(script: ModuleType, experts: int) -> None:
    dense = dense_model()
    plan = recipe(script, experts=experts, top_k=experts)
    mlp, inputs = dense.model.layers[1].mlp, torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    split = script.split_neurons(script.contributions(mlp, inputs), plan)
    assert sorted(torch.cat([split.shared, split.routed.flatten()]).tolist()) == list(range(96))
    assert split.routed.shape == (experts, 64 // experts)
    block = script.carve(mlp, split, torch.zeros(experts, 32), plan.config(dense.config))
    with torch.no_grad():
        torch.testing.assert_close(block(inputs[None])[0], mlp(inputs), rtol=1e-4, atol=1e-6)


def test_neurons_that_are_active_together_come_to_one_expert(script: ModuleType) -> None:
    plan = recipe(script, experts=4)
    owner = torch.arange(40) % 4
    generator = torch.Generator().manual_seed(0)
    signals = torch.randn(4, 300, generator=generator)
    points = signals[owner] + 0.1 * torch.randn(40, 300, generator=generator)
    found = script.balanced_clusters(torch.nn.functional.normalize(points, dim=1), plan)
    assert found.shape == (4, 10)
    assert all(len(set(owner[rows].tolist())) == 1 for rows in found)


def test_the_router_sends_tokens_to_the_experts_that_would_give_most(script: ModuleType) -> None:
    dense = dense_model()
    mlp = dense.model.layers[1].mlp
    inputs = torch.randn(2000, 32, generator=torch.Generator().manual_seed(2))
    rows = torch.arange(96)
    split = script.Split(rows[:32], rows[32:].reshape(4, 16))
    with torch.no_grad():  # each expert is loud along one direction of the input
        for expert, own in enumerate(split.routed):
            mlp.gate_proj.weight[own] = 0.05 * mlp.gate_proj.weight[own]
            mlp.gate_proj.weight[own, expert] += 1.0
        router = script.ridge_router(mlp, split, inputs)
        hidden = mlp.act_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)
        norms = torch.stack([(hidden[:, own] @ mlp.down_proj.weight[:, own].T).norm(dim=1) for own in split.routed], 1)
    agreed = (inputs @ router.T).argmax(1) == norms.argmax(1)
    assert agreed.float().mean() > 0.6  # 0.25 by chance


def test_a_carved_checkpoint_is_a_moe_model_near_the_dense_one(script: ModuleType, tmp_path: Path) -> None:
    dense, tok = dense_model(), tiny_tokenizer()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    report = script.carve_model(dense, tok, recipe(script), tmp_path, "a source")
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert read_json(tmp_path / "carved.json")["median_relative_error"].keys() == {"1", "2"}
    assert max(report["median_relative_error"].values()) < 0.8
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(MoELayerView(model).layers) == {1, 2}
    same = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(same["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])

    undistilled = script.carve_model(dense, tok, recipe(script, steps=0), tmp_path / "other", "a source")
    for layer, error in report["median_relative_error"].items():
        assert error < undistilled["median_relative_error"][layer]


def test_a_stopped_run_goes_on_where_it_was(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: str) -> dict[str, torch.Tensor]:
        script.carve_model(dense_model(), tiny_tokenizer(), recipe(script, steps=5), tmp_path / folder, "a source")
        return load_file(tmp_path / folder / "model.safetensors")

    whole = run("whole")
    distil, seen = script.distil, []

    def stop_at_the_second(*args: object) -> None:
        seen.append(args[-1])
        if len(seen) == 2:
            raise KeyboardInterrupt
        distil(*args)

    monkeypatch.setattr(script, "distil", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    again = run("stopped")
    assert seen == ["layer 1", "layer 2", "layer 2"]
    assert all(torch.equal(whole[name], again[name]) for name in whole)
