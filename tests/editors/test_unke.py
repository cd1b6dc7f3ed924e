from __future__ import annotations

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
    corpus,
    edit,
    routed_parameters,
    settings,
)
from tiny import CASES, TEXTS, assert_same_state, requests, state_of, tiny_model
from torch import Tensor, nn

from easyedit_moe.editors import UnKEEditor, editor_class, make_editor
from easyedit_moe.errors import DataError, HyperParamsError, LayerError, RequestError
from easyedit_moe.facts.requests import parse_requests
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.targets.search import TargetVectors, compute_targets

LAYER = 2
OTHERS = [TEXTS[i] for i in (1, 4, 5, 6, 7)]  # the rest of the corpus mentions subjects of requests(3)


def outputs(model: nn.Module, text: str, layer: int = LAYER) -> Tensor:
    """Output of a layer at every token of one text, from a plain forward; differentiable."""
    caught: list[Tensor] = []
    hook = model.model.layers[layer].register_forward_hook(
        lambda _, __, out: caught.append(out if isinstance(out, Tensor) else out[0])
    )
    model(torch.tensor([TOK(text)["input_ids"]]))
    hook.remove()
    return caught[0][0]


def last_subject_token(fact: dict[str, str]) -> int:
    offsets = TOK(fact["prompt"], return_offsets_mapping=True)["offset_mapping"]
    end = fact["prompt"].index(fact["subject"]) + len(fact["subject"])
    return [i for i, (a, b) in enumerate(offsets) if a < end <= b][-1]


def targets_of(model: nn.Module, facts: list[dict[str, str]], **changes: Any) -> TargetVectors:
    layer, prefixes, found = UnKEEditor(settings("UnKE", **changes)).target_settings()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compute_targets(MoELayerView(model), TOK, parse_requests(facts), layer, prefixes, found, False)


@pytest.mark.parametrize(("family", "how"), CASES)
def test_every_family(family: str, how: str) -> None:
    model = tiny_model(family, implementation=how)
    written = routed_parameters(model, [LAYER], "")
    hp = settings("UnKE", v_num_grad_steps=10, optim_num_step=10, lr=2e-3)
    check_one_edit(model, hp, written, every=family != "modulelist")


@pytest.mark.parametrize("family", ["gpt_oss", "modulelist"])
def test_the_fact_tokens_reach_their_targets(family: str, tmp_path: Path) -> None:
    model, facts = tiny_model(family), requests(3)
    targets = targets_of(model, facts)
    with torch.no_grad():
        start = [outputs(model, fact["prompt"]) for fact in facts]
    shown = {"preserve_dataset": corpus(tmp_path), "preserve_n_samples": 8}
    edit(model, settings("UnKE", lr=0.01, optim_num_step=90, **shown), facts, targets=targets)
    with torch.no_grad():
        end = [outputs(model, fact["prompt"]) for fact in facts]
    for t, fact in enumerate(facts):
        at, wanted = last_subject_token(fact), targets.delta[t]
        assert wanted.norm() > 0.1
        moved = end[t] - start[t]
        assert (moved[at] - wanted).norm() < 0.3 * wanted.norm()
        others = torch.cat([moved[:at], moved[at + 1 :]])
        assert others.norm(dim=1).mean() < 0.3 * wanted.norm()


def test_texts_are_preserved_and_by_how_much_is_a_matter_of_weight(tmp_path: Path) -> None:
    drift = {}
    for weight in (0.0, 1.0, 10.0):
        model = tiny_model()
        with torch.no_grad():
            start = [outputs(model, text) for text in OTHERS]
        shown = {"preserve_dataset": corpus(tmp_path), "preserve_n_samples": 8, "preserve_weight": weight}
        edit(model, settings("UnKE", lr=0.01, optim_num_step=30, **shown), requests(3))
        with torch.no_grad():
            drift[weight] = sum(float((outputs(model, t) - s).norm()) for t, s in zip(OTHERS, start, strict=True))
    assert drift[10.0] < drift[1.0] < 0.7 * drift[0.0]


def reference_loss(model: nn.Module, before: nn.Module, facts: list[dict[str, str]], delta: Tensor) -> Tensor:
    """The paper's two sums, over plain forwards of one text each, with weight 2 on what is to stay."""
    total = torch.zeros((), dtype=torch.float64)
    count = 0.0
    for text in OTHERS:
        with torch.no_grad():
            kept = outputs(before, text).double()
        total = total + 2 * ((outputs(model, text).double() - kept) ** 2).sum()
        count += 2 * len(kept)
    for t, fact in enumerate(facts):
        at = last_subject_token(fact)
        with torch.no_grad():
            wanted = outputs(before, fact["prompt"]).double()
        wanted[at] += delta[t]
        weight = torch.full((len(wanted), 1), 2.0, dtype=torch.float64)
        weight[at] = 1
        total = total + (weight * (outputs(model, fact["prompt"]).double() - wanted) ** 2).sum()
        count += float(weight.sum())
    return total / count


@pytest.mark.parametrize(("family", "how", "size"), [("qwen3_moe", "grouped_mm", 2), ("gpt_oss", "eager", 256)])
def test_stage_two_is_adam_on_both_terms(family: str, how: str, size: int, tmp_path: Path) -> None:
    model, other, before = tiny_model(family, implementation=how), tiny_model(family), tiny_model(family)
    facts = requests(3)
    targets = targets_of(before, facts)
    shown = {"preserve_dataset": corpus(tmp_path), "preserve_n_samples": 8, "preserve_weight": 2.0}
    hp = settings("UnKE", lr=1e-3, optim_num_step=3, train_batch_size=size, **shown)
    edit(model, hp, facts, targets=targets)
    names = sorted(routed_parameters(model, [LAYER], ""))
    parameters = [other.get_parameter(n) for n in names]
    first, second = ([torch.zeros_like(p, dtype=torch.float64) for p in parameters] for _ in range(2))
    for t in range(1, 4):
        grads = torch.autograd.grad(reference_loss(other, before, facts, targets.delta.double()), parameters)
        for i, (parameter, gradient) in enumerate(zip(parameters, grads, strict=True)):
            first[i] = 0.9 * first[i] + 0.1 * gradient.double()
            second[i] = 0.999 * second[i] + 0.001 * gradient.double() ** 2
            step = first[i] / (1 - 0.9**t) / ((second[i] / (1 - 0.999**t)).sqrt() + 1e-8)
            parameter.data -= (1e-3 * step).float()
    for name in names:
        start = before.get_parameter(name).detach()
        moved, wanted = model.get_parameter(name) - start, other.get_parameter(name) - start
        # Adam divides by |gradient|, so that tiny gradients turn rounding into whole steps.
        assert (moved - wanted).norm() < 0.05 * wanted.norm(), name


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "modulelist"])
def test_what_is_trained(family: str) -> None:
    layer = {n for n, _ in tiny_model(family).named_parameters() if f".layers.{LAYER}." in n}
    expected = {
        "layer": layer,
        "experts": routed_parameters(tiny_model(family), [LAYER], ""),
        "down_projections": routed_parameters(tiny_model(family), [LAYER]),
    }
    assert expected["down_projections"] < expected["experts"] < expected["layer"]
    for train, names in expected.items():
        model = tiny_model(family)
        before = state_of(model)
        hp = settings("UnKE", train=train)
        assert make_editor(hp).edits == ("layer" if train == "layer" else "experts")
        result = edit(model, hp, requests(3))
        changed = changed_parameters(before, model)
        assert changed <= names
        assert len(changed) > 0.6 * len(names)
        result.patch.revert(model)
        assert_same_state(before, state_of(model))


def test_targets_may_be_given() -> None:
    facts, found, given = requests(3), tiny_model(), tiny_model()
    first = edit(found, settings("UnKE"), facts)
    assert first.seconds["targets"] > 0
    second = edit(given, settings("UnKE"), facts, targets=first.targets[0])
    assert second.seconds["targets"] == 0
    assert_same_state(state_of(found), state_of(given))


def test_prefixes_are_fitted_as_well() -> None:
    prefix, facts = "In the evening, ", requests(2)
    left = {}
    for prefixes in ([], [prefix]):
        model = tiny_model()
        targets = targets_of(model, facts, context_prefixes=prefixes)
        with torch.no_grad():
            start = [outputs(model, prefix + fact["prompt"]) for fact in facts]
        hp = settings("UnKE", context_prefixes=prefixes, lr=0.01, optim_num_step=60)
        edit(model, hp, facts, targets=targets)
        distance = []
        for t, fact in enumerate(facts):
            at = len(TOK(prefix + fact["prompt"])["input_ids"]) - len(TOK(fact["prompt"])["input_ids"])
            at += last_subject_token(fact)
            with torch.no_grad():
                moved = outputs(model, prefix + fact["prompt"])[at] - start[t][at]
            distance.append(float((moved - targets.delta[t]).norm() / targets.delta[t].norm()))
        left[bool(prefixes)] = sum(distance)
    assert left[True] < 0.7 * left[False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    before = state_of(model)
    result = edit(model, settings("UnKE", lr=1e-3, optim_num_step=10), requests(3))
    assert changed_parameters(before, model) == routed_parameters(model, [LAYER], "")
    assert all(0 < report.rounding_loss < 1 for report in result.patch.reports)
    result.patch.revert(model)
    assert_same_state(before, state_of(model))


def test_scopes() -> None:
    check_scopes(settings("UnKE"))


def test_batches(tmp_path: Path) -> None:
    check_batches(settings("UnKE", train="layer"), tmp_path)


def test_stand_alone() -> None:
    check_stand_alone(settings("UnKE", batch_size=2))


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("train", ["experts", "layer"])
def test_interrupted(train: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    check_interrupted(settings("UnKE", train=train), error, monkeypatch)


def test_refusals(tmp_path: Path) -> None:
    check_refusals("UnKE", with_targets=targets_of(tiny_model(), requests(3)))
    model = tiny_model()
    before = state_of(model)
    wanted = {"preserve_dataset": str(tmp_path / "missing.txt"), "preserve_n_samples": 3}
    with pytest.raises(DataError, match="does not exist"):
        edit(model, settings("UnKE", **wanted), requests(1))
    with pytest.raises(RequestError, match="3 target vectors for 2 requests"):
        edit(model, settings("UnKE"), requests(2), targets=targets_of(model, requests(3)))
    with pytest.raises(LayerError, match="dense"):
        edit(tiny_model("deepseek_v3"), settings("UnKE", layers=[0]), requests(1))
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [1, 2]}, "layers must be a single layer for UnKE"),
        ({"train": "router"}, "train must be one of experts, down_projections, layer"),
        ({"lr": 0.0}, "lr must be greater than 0"),
        ({"v_lr": -1.0}, "v_lr must be greater than 0"),
        ({"optim_num_step": 0}, "optim_num_step must be at least 1"),
        ({"preserve_n_samples": -1}, "preserve_n_samples must be at least 0"),
        ({"fact_token": "first"}, "fact_token must be one of"),
        ({"num_steps": 3}, "unknown key 'num_steps'"),
    ],
)
def test_hparams_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HyperParamsError, match=message):
        settings("UnKE", **changes)


def test_registry() -> None:
    assert editor_class("UnKE") is UnKEEditor
    assert UnKEEditor.edits == "experts"
