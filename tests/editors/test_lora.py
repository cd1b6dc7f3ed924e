from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from baselines import (
    ERRORS,
    TOK,
    changed_parameters,
    check_batches,
    check_interrupted,
    check_one_edit,
    check_refusals,
    check_scopes,
    check_stand_alone,
    edit,
    routed_parameters,
    settings,
    structure,
)
from tiny import CASES, assert_same_state, requests, state_of, tiny_model, token_ids
from torch import Tensor, nn

from easyedit_moe.editors import AdaLoRAEditor, MoELoRAEditor, apply_adalora_to_model, editor_class, moe_lora
from easyedit_moe.editors.moe_lora import same_structure
from easyedit_moe.errors import DependencyError, HyperParamsError, LayerError, LayoutError

METHODS = ("MoE-LoRA", "AdaLoRA")
peft = pytest.importorskip("peft")


@pytest.fixture
def adapted(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Logits of the model while the adapters are still in it, at the end of training."""
    seen: list[Tensor] = []
    original = moe_lora._deltas

    def reading(model: nn.Module) -> dict[str, Tensor]:
        seen.append(_logits(model))
        return original(model)

    monkeypatch.setattr(moe_lora, "_deltas", reading)
    return seen


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([token_ids(12), token_ids(12, 1)])).logits.float()


def _weights(model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    return {name: model.get_parameter(name).detach().clone() for name in names}


@pytest.mark.parametrize(("family", "how"), CASES)
def test_every_family(family: str, how: str) -> None:
    model = tiny_model(family, implementation=how)
    train, part = ("experts", "proj") if how == "eager" else ("down_projections", "down_proj")
    written = routed_parameters(model, [1, 2], part)
    hp = settings("MoE-LoRA", train=train, lr=1e-3)
    result = check_one_edit(model, hp, written, every=family != "modulelist")
    assert len(result.patch.names) > (10 if family == "modulelist" else 1)


@pytest.mark.parametrize(("family", "how"), [case for case in CASES if case[1] == "grouped_mm" or "list" in case[0]])
def test_adalora_in_every_family(family: str, how: str) -> None:
    model = tiny_model(family, implementation=how)
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is nn.Linear and ("layers.1." in name or "layers.2." in name) and "attn" in name
    }
    assert len(linear) >= 8
    check_one_edit(model, settings("AdaLoRA", lr=2e-3), linear)


@pytest.mark.parametrize("method", [("MoE-LoRA", {"train": "experts"}), ("AdaLoRA", {})])
@pytest.mark.parametrize(
    ("family", "how"), [("qwen3_moe", "grouped_mm"), ("gpt_oss", "eager"), ("modulelist", "eager")]
)
def test_the_plain_model_computes_what_the_adapted_one_did(
    family: str, how: str, method: tuple[str, dict[str, Any]], adapted: list[Tensor]
) -> None:
    model = tiny_model(family, implementation=how)
    before = _logits(model)
    edit(model, settings(method[0], lr=0.02, **method[1]), requests(3))
    after = _logits(model)
    assert len(adapted) == 1
    torch.testing.assert_close(after, adapted[0], atol=2e-5, rtol=1e-4)
    assert (after - before).norm() > 100 * (after - adapted[0]).norm()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_each_expert_gets_an_adapter_of_its_rank(family: str) -> None:
    model = tiny_model(family)
    names = routed_parameters(model, [1, 2], "proj")
    before = _weights(model, names)
    edit(model, settings("MoE-LoRA", rank=2, train="experts", lr=0.01), requests(3))
    for name in names:
        change = (model.get_parameter(name) - before[name]).detach()
        assert change.dim() == 3
        singular = torch.linalg.svdvals(change.double())
        assert (singular[:, 1] > 1e-4).sum() >= 4
        assert (singular[:, 2:] < 1e-6).all()


def test_adalora_cuts_ranks_to_their_budget() -> None:
    model = tiny_model()
    names = {
        n for n, _ in model.named_parameters() if "self_attn" in n and ("s.1." in n or "s.2." in n) and "proj" in n
    }
    before = _weights(model, names)
    ranks = {}
    for steps in (12, 2):
        result = edit(model, settings("AdaLoRA", rank=2, num_steps=steps, train_batch_size=3, lr=0.02), requests(3))
        changes = {name: (model.get_parameter(name) - before[name]).detach().double() for name in names}
        ranks[steps] = [int((torch.linalg.svdvals(c) > 1e-6).sum()) for c in changes.values()]
        result.patch.revert(model)
    assert len(ranks[12]) == 8
    assert 0 < sum(ranks[12]) <= 8 * 2
    assert max(ranks[12]) <= 3  # each starts at 1.5 rank
    assert len(set(ranks[12])) > 1


def test_adalora_keeps_singular_vectors_near_orthogonal(monkeypatch: pytest.MonkeyPatch) -> None:
    distances = {}
    for weight in (0.0, 5.0):
        seen: list[float] = []

        def reading(model: nn.Module, seen: list[float] = seen) -> dict[str, Tensor]:
            for name, p in model.named_parameters():
                if "lora_A" in name:
                    seen.append(float((p @ p.T - torch.eye(len(p))).norm()))
            return {}

        monkeypatch.setattr(moe_lora, "_deltas", reading)
        edit(tiny_model(), settings("AdaLoRA", orth_reg_weight=weight, num_steps=5, lr=0.02), requests(3))
        distances[weight] = sum(seen)
    assert distances[5.0] < 0.8 * distances[0.0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    before, tree = state_of(model), structure(model)
    result = edit(model, settings(method, lr=1e-2, num_steps=6), requests(3))
    assert changed_parameters(before, model)
    assert all(0 < report.rounding_loss < 1 for report in result.patch.reports)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert structure(model) == tree
    result.patch.revert(model)
    assert_same_state(before, state_of(model))


def test_adalora_adapts_the_modules_it_is_told_to() -> None:
    model = tiny_model()
    before = state_of(model)
    edit(model, settings("AdaLoRA", target_modules=["q_proj", "v_proj"]), requests(2))
    expected = {f"model.layers.{i}.self_attn.{n}_proj.weight" for i in (1, 2) for n in "qv"}
    assert changed_parameters(before, model) == expected
    other = tiny_model()
    before, tree = state_of(other), structure(other)
    with pytest.raises(LayerError, match=r"Layer 1 .* has no qkv, z beside its MoE block"):
        edit(other, settings("AdaLoRA", target_modules=["qkv", "z"]), requests(2))
    assert_same_state(before, state_of(other))
    assert structure(other) == tree


@pytest.mark.parametrize("method", METHODS)
def test_without_peft(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model = tiny_model()
    before = state_of(model)
    with pytest.raises(DependencyError, match="pip install peft"):
        edit(model, settings(method), requests(1))
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("method", METHODS)
def test_a_model_with_adapters_is_refused(method: str) -> None:
    model = tiny_model()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    before = state_of(adapted)
    for given in (adapted, model):
        with pytest.raises(LayoutError, match="already has adapters"):
            edit(given, settings(method), requests(1))
    assert_same_state(before, state_of(adapted))


@pytest.mark.parametrize("method", METHODS)
def test_adapters_that_are_half_way_in(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = peft.get_peft_model

    def failing(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        raise KeyboardInterrupt("planted")

    monkeypatch.setattr(peft, "get_peft_model", failing)
    model = tiny_model()
    before, tree = state_of(model), structure(model)
    with pytest.raises(KeyboardInterrupt, match="planted"):
        edit(model, settings(method), requests(1))
    assert_same_state(before, state_of(model))
    assert structure(model) == tree


def test_same_structure_puts_everything_back() -> None:
    model = tiny_model()
    before, tree = state_of(model), structure(model)
    layer = model.model.layers[1]

    def spoil() -> None:
        with same_structure(model):
            layer.mlp = nn.Linear(2, 2)
            layer.self_attn.q_proj.weight = nn.Parameter(torch.zeros(1))
            layer.note = "x"
            del layer.input_layernorm
            layer.register_forward_hook(lambda *_: None)
            nn.utils.parametrize.register_parametrization(layer.self_attn.k_proj, "weight", nn.Identity())
            raise KeyError

    with pytest.raises(KeyError):
        spoil()
    assert_same_state(before, state_of(model))
    assert structure(model) == tree


@pytest.mark.parametrize("method", METHODS)
def test_scopes(method: str) -> None:
    check_scopes(settings(method))


@pytest.mark.parametrize("method", METHODS)
def test_batches(method: str, tmp_path: Path) -> None:
    check_batches(settings(method), tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_stand_alone(method: str) -> None:
    check_stand_alone(settings(method, batch_size=2))


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("method", METHODS)
def test_interrupted(method: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    check_interrupted(settings(method), error, monkeypatch)


@pytest.mark.parametrize("method", METHODS)
def test_refusals(method: str) -> None:
    check_refusals(method, with_targets=torch.zeros(2, 32))


@pytest.mark.parametrize("method", METHODS)
def test_no_warnings_of_peft(method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        edit(tiny_model(), settings(method), requests(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"lora_alpha": 0.0}, "lora_alpha must be greater than 0"),
        ({"train": "layer"}, "train must be one of down_projections, experts"),
        ({"orth_reg_weight": -1.0}, "orth_reg_weight must be at least 0"),
        ({"target_modules": "q_proj"}, "target_modules must be a list of str"),
    ],
)
def test_hparams_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HyperParamsError, match=message):
        settings("AdaLoRA", **changes)


def test_registry_and_table() -> None:
    assert editor_class("MoE-LoRA") is MoELoRAEditor
    assert editor_class("AdaLoRA") is AdaLoRAEditor
    assert (MoELoRAEditor.edits, AdaLoRAEditor.edits) == ("experts", "dense site")
    model = tiny_model()
    before = state_of(model)
    _, weights = apply_adalora_to_model(model, TOK, requests(1), settings("AdaLoRA"), return_orig_weights=True)
    for name, original in weights.items():
        model.get_parameter(name).data[...] = original
    assert_same_state(before, state_of(model))
