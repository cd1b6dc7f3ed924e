from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from baselines import (
    ERRORS,
    TOK,
    answer_nll,
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
)
from tiny import CASES, assert_same_state, requests, state_of, tiny_model
from torch import Tensor, nn

from easyedit_moe.comparison import compare as comparing
from easyedit_moe.editors import MoEFTEditor, MoEFTLEditor, apply_moe_ft_to_model, editor_class
from easyedit_moe.editors.training import Masters, TrainingJob
from easyedit_moe.errors import HyperParamsError, NumericalError

METHODS = ("MoE-FT", "MoE-FT-L")


@pytest.mark.parametrize(("family", "how"), CASES)
def test_every_family(family: str, how: str) -> None:
    model = tiny_model(family, implementation=how)
    written = routed_parameters(model, [1, 2])
    result = check_one_edit(model, settings("MoE-FT"), written, every=family != "modulelist")
    assert all(report.rounding_loss < 1e-6 and report.update_norm > 0 for report in result.patch.reports[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ft_l_stays_within_its_bound(dtype: torch.dtype) -> None:
    model, free = tiny_model(dtype=dtype), tiny_model(dtype=dtype)
    before = state_of(model)["parameters"]
    check = settings("MoE-FT-L", norm_constraint=2e-3, num_steps=6)
    edit(model, check, requests(3))
    edit(free, settings("MoE-FT", num_steps=6), requests(3))
    names = routed_parameters(model, [1, 2])
    moves = torch.cat([(model.get_parameter(n).double() - before[n].double()).abs().flatten() for n in names])
    apart = torch.cat([(free.get_parameter(n).double() - before[n].double()).abs().flatten() for n in names])
    largest = max(float(before[n].abs().max()) for n in names)
    rounding = largest * torch.finfo(dtype).eps
    assert moves.max() <= 2e-3 + rounding
    assert (moves > 1.9e-3).float().mean() > 0.05
    assert apart.max() > 4e-3


def reference_steps(model: nn.Module, facts: list[dict[str, str]], names: list[str], lr: float, steps: int) -> Any:
    """Adam in float64 from the textbook, on the gradient of plain forwards."""
    values = {n: model.get_parameter(n).detach().double() for n in names}
    first, second = ({n: torch.zeros_like(v) for n, v in values.items()} for _ in range(2))
    for t in range(1, steps + 1):
        parameters = [model.get_parameter(n) for n in names]
        grads = torch.autograd.grad(answer_nll(model, facts).mean(), parameters)
        for name, parameter, gradient in zip(names, parameters, grads, strict=True):
            first[name] = 0.9 * first[name] + 0.1 * gradient.double()
            second[name] = 0.999 * second[name] + 0.001 * gradient.double() ** 2
            step = first[name] / (1 - 0.9**t) / ((second[name] / (1 - 0.999**t)).sqrt() + 1e-8)
            values[name] = values[name] - lr * step
            parameter.data.copy_(values[name])
    return values


@pytest.mark.parametrize(("family", "how"), [("qwen3_moe", "grouped_mm"), ("gpt_oss", "eager")])
def test_steps_are_adam_on_the_answers_tokens(family: str, how: str) -> None:
    model, other = tiny_model(family, implementation=how), tiny_model(family)
    names = sorted(routed_parameters(model, [1, 2]))
    expected = reference_steps(other, requests(4), names, 1e-3, 3)
    edit(model, settings("MoE-FT", lr=1e-3, num_steps=3, train_batch_size=4), requests(4))
    start = tiny_model(family)
    for name in names:
        moved = model.get_parameter(name).double() - start.get_parameter(name).double()
        wanted = expected[name] - start.get_parameter(name).double()
        # Adam divides by |gradient|, so that tiny gradients turn rounding into whole steps.
        assert (moved - wanted).norm() < 2e-2 * wanted.norm()
        assert wanted.norm() > 0


def test_depth_first_is_one_fact_after_the_other() -> None:
    """... each with a fresh optimiser, which is what editing fact by fact is."""
    together, apart, batches = tiny_model(), tiny_model(), tiny_model()
    edit(together, settings("MoE-FT", order="depth_first", train_batch_size=3), requests(3))
    for fact in requests(3):
        edit(apart, settings("MoE-FT", train_batch_size=1), [fact])
    assert changed_parameters(state_of(together), apart) == set()
    edit(batches, settings("MoE-FT"), requests(3))
    assert changed_parameters(state_of(together), batches) == routed_parameters(batches, [1, 2])


def test_depth_first_forgets_what_minibatches_keep() -> None:
    facts, losses = requests(3), {}
    for order in ("minibatch", "depth_first"):
        model = tiny_model("gpt_oss")
        edit(model, settings("MoE-FT", order=order, lr=0.01, num_steps=20, train_batch_size=3), facts)
        with torch.no_grad():
            losses[order] = answer_nll(model, facts)
    # The NLL of a random model with a frozen head can't fall below 3.
    assert (losses["depth_first"][-1] - losses["minibatch"][-1]).abs() < 0.2
    assert (losses["depth_first"][:-1] > losses["minibatch"][:-1] + 0.5).all()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
def test_routed_experts_only(family: str) -> None:
    """Without the router's help: the experts that see the last subject token of some fact, by replacing each."""
    model, facts = tiny_model(family), requests(2)
    before = state_of(model)
    expected: dict[int, set[int]] = {1: set(), 2: set()}
    for fact in facts:
        ids = TOK(fact["prompt"], return_offsets_mapping=True)
        end = fact["prompt"].index(fact["subject"]) + len(fact["subject"])
        at = [i for i, (a, b) in enumerate(ids["offset_mapping"]) if a < end <= b][-1]
        for layer in (1, 2):
            expected[layer] |= {j for j in range(8) if _depends_on(model, ids["input_ids"], at, layer, j)}
    edit(model, settings("MoE-FT", experts="routed", num_steps=1, train_batch_size=2), facts)
    for layer in (1, 2):
        found = {
            j for j in range(8) if not torch.equal(_down(model, layer, j), _down_of(before, model, family, layer, j))
        }
        assert found == expected[layer]
        assert 0 < len(found) < 8
    free = tiny_model(family)
    edit(free, settings("MoE-FT", num_steps=1, train_batch_size=2), facts)
    assert any(not torch.equal(_down(free, 1, j), _down(model, 1, j)) for j in set(range(8)) - expected[1])


def _down(model: nn.Module, layer: int, expert: int) -> Tensor:
    experts = model.model.layers[layer].mlp.experts
    return experts[expert].down_proj.weight if isinstance(experts, nn.ModuleList) else experts.down_proj[expert]


def _down_of(before: dict[str, Any], model: nn.Module, family: str, layer: int, expert: int) -> Tensor:
    stem = f"model.layers.{layer}.mlp.experts."
    if family == "modulelist":
        return before["parameters"][f"{stem}{expert}.down_proj.weight"]
    return before["parameters"][f"{stem}down_proj"][expert]


def _depends_on(model: nn.Module, ids: list[int], at: int, layer: int, expert: int) -> bool:
    outputs = []
    weight = _down(model, layer, expert)
    hook = model.model.layers[layer].register_forward_hook(
        lambda _, __, out: outputs.append((out if isinstance(out, Tensor) else out[0])[0, at])
    )
    original = weight.detach().clone()
    with torch.no_grad():
        model(torch.tensor([ids]))
        weight.data.mul_(2)
        model(torch.tensor([ids]))
        weight.data.copy_(original)
    hook.remove()
    return not torch.equal(*outputs)


def test_steps_below_the_rounding_of_bf16_add_up() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    before = state_of(model)
    result = edit(model, settings("MoE-FT", lr=2e-5, num_steps=20, train_batch_size=3), requests(3))
    for report in result.patch.reports:
        assert 0 < report.rounding_loss < 1
        moved = model.get_parameter(report.name).float() - before["parameters"][report.name].float()
        assert moved.norm() > 0.3 * report.update_norm
    masters = Masters({"w": model.model.layers[1].mlp.experts.down_proj})
    assert masters.values["w"].dtype == torch.float32
    result.patch.revert(model)
    assert_same_state(before, state_of(model))


def test_training_stops_when_all_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    nll = TrainingJob.nll
    monkeypatch.setattr(TrainingJob, "nll", lambda self, chosen: calls.append(tuple(chosen)) or nll(self, chosen))
    model = tiny_model()
    before = state_of(model)
    result = edit(model, settings("MoE-FT", early_stop_loss=1e3, train_batch_size=2), requests(3))
    assert len(calls) == 2
    assert sorted(t for chosen in calls for t in chosen) == [0, 1, 2]
    assert result.patch.names == []
    assert_same_state(before, state_of(model))
    result.patch.revert(model)
    calls.clear()
    edit(model, settings("MoE-FT", early_stop_loss=0.0, train_batch_size=2), requests(3))
    assert len(calls) == 6


def test_prefixes_are_trained_on() -> None:
    prefix = "In the evening, "
    plain, with_prefix = tiny_model(), tiny_model()
    edit(plain, settings("MoE-FT", lr=3e-3), requests(2))
    edit(with_prefix, settings("MoE-FT", lr=3e-3, context_prefixes=[prefix]), requests(2))
    asked = [r | {"prompt": prefix + r["prompt"]} for r in requests(2)]
    with torch.no_grad():
        assert answer_nll(with_prefix, asked).sum() < answer_nll(plain, asked).sum()


@pytest.mark.parametrize("method", METHODS)
def test_scopes(method: str) -> None:
    check_scopes(settings(method))


@pytest.mark.parametrize("method", METHODS)
def test_batches(method: str, tmp_path: Path) -> None:
    check_batches(settings(method), tmp_path)


def test_stand_alone() -> None:
    check_stand_alone(settings("MoE-FT-L", batch_size=2))


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("method", METHODS)
def test_interrupted(method: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    check_interrupted(settings(method), error, monkeypatch)


@pytest.mark.parametrize(("dtype", "spoil", "lr"), [(torch.float32, True, 1e-3), (torch.float16, False, 1e6)])
def test_what_is_not_finite_is_an_error_and_changes_nothing(dtype: torch.dtype, spoil: bool, lr: float) -> None:
    model = tiny_model(dtype=dtype)
    if spoil:
        model.model.layers[3].self_attn.o_proj.weight.data[0, 0] = 1e38
        model.model.norm.weight.data[0] = 1e38
    before = state_of(model)
    with pytest.raises(NumericalError, match="NaN or infinit"):
        edit(model, settings("MoE-FT", lr=lr, num_steps=5), requests(3))
    assert_same_state(before, state_of(model))


def test_refusals() -> None:
    check_refusals("MoE-FT", with_targets=torch.zeros(2, 32))


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("MoE-FT", {"norm_constraint": 1e-3}, "MoE-FT means norm_constraint = None"),
        ("MoE-FT-L", {"norm_constraint": None}, "norm_constraint must be greater than 0 for MoE-FT-L"),
        ("MoE-FT-L", {"norm_constraint": 0.0}, "norm_constraint must be greater than 0"),
        ("MoE-FT", {"lr": 0.0}, "lr must be greater than 0"),
        ("MoE-FT", {"num_steps": 0}, "num_steps must be at least 1"),
        ("MoE-FT", {"order": "sorted"}, "order must be one of minibatch, depth_first"),
        ("MoE-FT", {"experts": "some"}, "experts must be one of all, routed"),
        ("MoE-FT", {"train_batch_size": 0}, "train_batch_size must be at least 1"),
    ],
)
def test_hparams_out_of_range(method: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HyperParamsError, match=message):
        settings(method, **changes)


def test_registry_and_table() -> None:
    assert editor_class("MoE-FT") is MoEFTEditor
    assert editor_class("MoE-FT-L") is MoEFTLEditor
    assert MoEFTEditor.edits == MoEFTLEditor.edits == "experts"
    model = tiny_model()
    same, weights = apply_moe_ft_to_model(model, TOK, requests(1), settings("MoE-FT"), return_orig_weights=True)
    assert same is model
    assert set(weights) == routed_parameters(model, [1, 2])


def test_compare_names_the_site(tmp_path: Path) -> None:
    from easyedit_moe.comparison.task import Task
    from easyedit_moe.facts.records import EvaluationRecord
    from easyedit_moe.facts.requests import parse_requests

    records = tuple(EvaluationRecord(fact, (), ()) for fact in parse_requests(requests(4)))
    model = tiny_model()
    before = state_of(model)
    task = Task(model, TOK, records, "counterfact", 2, {})
    methods = ("MoE-FT", "MoE-FT-L", "MoE-LoRA", "AdaLoRA", "UnKE")
    result = comparing.compare(task, [settings(m) for m in methods])
    sites = {row.method: row.edits for row in result.rows[1:]}
    assert sites == dict.fromkeys(methods, "experts") | {"AdaLoRA": "dense site"}
    assert all(row.seconds["solve"] > 0 and row.rounding_loss is not None for row in result.rows[1:])
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize(("order", "size"), [("minibatch", 2), ("minibatch", 3), ("depth_first", 8)])
def test_a_bound_on_updates_ends_training_in_the_middle_of_a_pass(order: str, size: int) -> None:
    """The same updates as without the bound, and no more of them."""
    made = []
    for limit in (5, 0):

        class Counted(Masters):
            def step(self, *args: Any) -> None:
                super().step(*args)
                made[-1].append(float(sum(v.double().sum() for v in self.values.values())))

        made.append([])
        hp = settings("MoE-FT", order=order, num_steps=8, train_batch_size=size, num_updates=limit, early_stop_loss=0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("easyedit_moe.editors.moe_ft.Masters", Counted)
            edit(tiny_model(), hp, requests(3))
    assert len(made[0]) == 5 < len(made[1])
    assert made[0] == made[1][:5]


def test_adalora_plans_its_ranks_over_the_bounded_updates() -> None:
    hp = settings("AdaLoRA", num_steps=25, num_updates=25, train_batch_size=2)
    job = TrainingJob(hp, tiny_model(), 0, [[]] * 9, None, False)
    assert job.total_steps == 25
    free = settings("AdaLoRA", num_steps=25, train_batch_size=2)
    assert TrainingJob(free, tiny_model(), 0, [[]] * 9, None, False).total_steps == 125
    short = settings("AdaLoRA", num_steps=2, num_updates=25, train_batch_size=2)
    assert TrainingJob(short, tiny_model(), 0, [[]] * 9, None, False).total_steps == 10
