"""What edits say of themselves: measured against plain forwards and weights, and a planted case for each warning."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from baselines import settings
from solving_editors import TOK, edit, hparams, plain_ridge
from tiny import assert_same_state, requests, state_of, tiny_model
from torch import Tensor, nn

from easyedit_moe import MoEEditor, load_hyperparams, load_model, make_editor
from easyedit_moe.algebra.nullspace import ExpertProjector, NullSpace
from easyedit_moe.comparison.compare import compare
from easyedit_moe.comparison.task import Task, load_task
from easyedit_moe.editors import EditResult, apply_global_to_model
from easyedit_moe.editors.diagnosis import (
    EditDiagnosis,
    ExpertDiagnosis,
    FactDiagnosis,
    LayerDiagnosis,
    warnings_of,
)
from easyedit_moe.editors.solving import BatchSolve
from easyedit_moe.errors import (
    EditingWarning,
    KnownFactsWarning,
    LossUnchangedWarning,
    NoUpdateWarning,
    NullSpaceWarning,
    ResidualNotReachedWarning,
    RidgeTooLargeWarning,
    RoundingWarning,
    TargetNotReachedWarning,
)
from easyedit_moe.facts.records import load_records
from easyedit_moe.facts.requests import parse_requests
from easyedit_moe.hparams import MoEHyperParams, hyperparams_class
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.files import load_patch
from easyedit_moe.targets.search import TargetVectors

FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "modulelist"]
STRONG = {
    "v_num_grad_steps": 40, "v_lr": 0.5, "clamp_norm_factor": 30, "v_weight_decay": 0.0, "kl_factor": 0.0,
    "fact_token": "last",
}  # fmt: skip
"""A search that reaches every target of `easy`."""


pytestmark = pytest.mark.usefixtures("no_editing_warnings")


def teachable(family: str = "qwen3_moe", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model whose head is loud enough for any answer to become the likely one."""
    model = tiny_model(family)
    with torch.no_grad():
        model.lm_head.weight *= 5
    return model.to(dtype)


WORDS = ("is", "the", "Rome", "and")
"""Single tokens of the tiny tokenizer."""


def easy(count: int) -> list[dict[str, str]]:
    """Edits whose targets are single tokens."""
    return [fact | {"target_new": word} for fact, word in zip(requests(count), WORDS[:count], strict=True)]


def told(model: nn.Module, hp: MoEHyperParams, facts: Sequence[Any], **options: Any) -> tuple[EditResult, list[type]]:
    """An edit by a prepared editor, and the classes of what was warned, which must be what the result says."""
    editor = make_editor(hp, progress=False)
    editor.prepare(model, TOK)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = editor.edit(model, TOK, parse_requests(facts), **options)
    found = [w for w in caught if issubclass(w.category, EditingWarning)]
    assert [str(w.message) for w in found] == result.warnings == result.patch.warnings
    assert result.patch.metadata["warnings"] == result.warnings
    assert result.patch.metadata["diagnosis"] == result.diagnosis.to_dict()
    json.dumps(result.diagnosis.to_dict(), allow_nan=False)
    return result, [w.category for w in found]


# ---------------------------------------------------------------- warnings as functions of a diagnosis

FACT = FactDiagnosis("A is", "b", 5.0, 0.1, True, False, 0.9)
LAYER = LayerDiagnosis(3, (ExpertDiagnosis(0, 0.1, 5, 99), ExpertDiagnosis(2, 0.2, 6, 3)), 1e-3, 0.8, 0.1)
GOOD = EditDiagnosis(
    "Global", (FACT, FACT), (LAYER,), dtype="bfloat16", changed=True, rounding_loss=1e-3, steps=9,
    settings={
        "lambda_reg": 2.0, "metric": "nullspace", "nullspace_threshold": 0.02, "nullspace_relative": False,
        "low_coverage": "keep", "min_coverage": 10, "spread": "residual", "early_stop_loss": 0.05,
    },
)  # fmt: skip
TRAINED = EditDiagnosis(
    "MoE-FT", (replace(FACT, residual_share=None),) * 2, dtype="bfloat16", changed=True, rounding_loss=1e-3, steps=9,
    settings={"lr": 1e-5, "num_steps": 7, "early_stop_loss": 0.01, "norm_constraint": None},
)  # fmt: skip


def with_fact(d: EditDiagnosis, **changes: Any) -> EditDiagnosis:
    return replace(d, facts=(d.facts[0], replace(d.facts[1], **changes)))


def with_layer(d: EditDiagnosis, **changes: Any) -> EditDiagnosis:
    return replace(d, layers=(replace(d.layers[0], **changes),))


def empty_experts(d: EditDiagnosis, count: int, moved: float = 0.0) -> EditDiagnosis:
    experts = [replace(e, null_space=0, relative_update=moved) for e in d.layers[0].experts[:count]]
    return with_layer(d, experts=(*experts, *d.layers[0].experts[count:]))


def with_settings(d: EditDiagnosis, **changes: Any) -> EditDiagnosis:
    return replace(d, settings={**d.settings, **changes})


NOTHING = replace(GOOD, changed=False, rounding_loss=0.0)
SHORT = with_fact(GOOD, residual_share=0.3)
CASES = {
    "good": (GOOD, {}),
    "well trained": (TRAINED, {}),
    "an adapter": (replace(TRAINED, changed=None, rounding_loss=None, dtype=None), {}),
    "a known fact": (with_fact(GOOD, known=True), {KnownFactsWarning: "1 of 2 targets already"}),
    "a missed target": (with_fact(GOOD, reached=False), {TargetNotReachedWarning: "1 of 2.*v_num_grad_steps"}),
    "a missed answer": (with_fact(TRAINED, reached=False), {TargetNotReachedWarning: r"lr \(1e-05\), more num_steps"}),
    "an empty null space": (empty_experts(GOOD, 1), {NullSpaceWarning: r"1 of 2 .*layer 3.*0\.02.*threshold"}),
    "empty, but another layer's metric counts": (empty_experts(GOOD, 1, moved=0.3), {}),
    "a share of the largest eigenvalue": (
        with_settings(empty_experts(GOOD, 2), nullspace_relative=True), {NullSpaceWarning: "2 of 2.*of its largest"},
    ),
    "frozen experts": (with_settings(empty_experts(GOOD, 1), low_coverage="frozen", min_coverage=100), {}),
    "zero": (NOTHING, {NoUpdateWarning: "is zero.*lambda_reg"}),
    "zero, since all is known": (replace(NOTHING, steps=0), {NoUpdateWarning: "knows these facts.*early_stop_loss"}),
    "zero, since all is empty": (
        empty_experts(NOTHING, 2), {NullSpaceWarning: "2 of 2", NoUpdateWarning: "raise nullspace_threshold"},
    ),
    "zero, since all is frozen": (
        with_settings(empty_experts(NOTHING, 2), low_coverage="frozen", min_coverage=100),
        {NoUpdateWarning: "low_coverage is 'frozen'.*min_coverage"},
    ),
    "training that does nothing": (replace(TRAINED, changed=False, rounding_loss=0.0), {NoUpdateWarning: "layers"}),
    "no step of training": (
        replace(TRAINED, changed=False, rounding_loss=0.0, steps=0), {NoUpdateWarning: r"early_stop_loss \(0\.01\)"},
    ),
    "lost": (
        replace(with_fact(GOOD, residual_share=0.0), rounding_loss=0.99),
        {RoundingWarning: "bfloat16 swallowed 99% .*float32.*lambda_reg"},
    ),
    "lost, bit-equal": (replace(NOTHING, rounding_loss=1.0), {RoundingWarning: "every weight is what it was"}),
    "lost training": (
        with_settings(replace(with_fact(TRAINED, final_nll=5.0), rounding_loss=0.97), norm_constraint=1e-6),
        {RoundingWarning: r"lr \(1e-05\) or norm_constraint \(1e-06\)"},
    ),
    "short by the ridge": (
        with_layer(SHORT, fit=0.2, shrinkage=0.8), {RidgeTooLargeWarning: "1 of 2 .*30%.*lambda_reg 2 .*20.0%.* 0.5"},
    ),
    "short by the null space": (
        with_layer(SHORT, fit=0.2, shrinkage=0.1), {ResidualNotReachedWarning: "nearer than 20%.*nullspace_threshold"},
    ),
    "short by the ranks": (
        with_settings(with_layer(SHORT, fit=0.2, shrinkage=0.1), rank_in=4), {ResidualNotReachedWarning: "rank_in"},
    ),
    "short by sharing out": (
        with_settings(SHORT, spread="update"), {ResidualNotReachedWarning: "spread: residual"},
    ),
    "short by sharing out what fits little": (
        with_settings(with_fact(with_layer(GOOD, fit=0.4, shrinkage=0.1), residual_share=-0.9), spread="update"),
        {ResidualNotReachedWarning: "-90%.*spread: residual"},
    ),
    "short for another reason": (SHORT, {ResidualNotReachedWarning: "layers"}),
    "short by few steps": (
        with_settings(replace(SHORT, layers=(), settings={"lr": 1e-4}), optim_num_step=3),
        {ResidualNotReachedWarning: r"optim_num_step \(3\)"},
    ),
    "a loss that stays": (
        replace(TRAINED, facts=(replace(FACT, final_nll=4.9),) * 2), {LossUnchangedWarning: "5 before and 4.9 .*lr"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_warnings_follow_from_the_diagnosis(case: str) -> None:
    diagnosis, expected = CASES[case]
    found = warnings_of(diagnosis)
    assert [type(warning) for warning in found] == list(expected)
    for warning, pattern in zip(found, expected.values(), strict=True):
        with pytest.warns(type(warning), match=pattern):
            warnings.warn(warning, stacklevel=1)


def test_a_diagnosis_is_strict_json() -> None:
    odd = with_fact(GOOD, final_nll=float("nan"), residual_share=float("-inf"))
    text = json.dumps(odd.to_dict(), allow_nan=False)
    found = json.loads(text)
    assert found == odd.to_dict()
    assert (found["facts"][1]["final_nll"], found["facts"][1]["residual_share"]) == (None, None)
    assert found["layers"][0]["experts"][1] == {"expert": 2, "relative_update": 0.2, "null_space": 6, "coverage": 3}


# ---------------------------------------------------------------- what is measured


def fact_output(model: nn.Module, layer: int, prompts: Sequence[str], subject: str) -> Tensor:
    """Output of a layer at the subject's last token, one plain forward per prompt."""
    states = []
    for prompt in prompts:
        out = TOK(prompt, return_offsets_mapping=True)
        end = prompt.index(subject) + len(subject)
        at = [i for i, (a, b) in enumerate(out["offset_mapping"]) if a < end <= b][-1]
        hook = model.model.layers[layer].register_forward_hook(
            lambda _, __, out, at=at: states.append((out if isinstance(out, Tensor) else out[0])[0, at])
        )
        with torch.no_grad():
            model(torch.tensor([out["input_ids"]]))
        hook.remove()
    return torch.stack(states).double()


@pytest.mark.parametrize("variant", ["Global", "MoTE/residual", "MoTE/update", "MoEEdit-BCD", "MoE-ROME", "UnKE"])
@pytest.mark.parametrize("prefixes", [[], ["The fox: ", "A quiet harbour. "]])
def test_shares_are_those_of_plain_forwards(variant: str, prefixes: list[str], data: Path) -> None:
    model, facts = tiny_model(), requests(1 if variant == "MoE-ROME" else 3)
    hp = hparams(data, variant) if variant != "UnKE" else settings("UnKE", lr=1e-3)
    hp.context_prefixes = prefixes
    contexts = [[prefix + fact["prompt"] for prefix in ["", *prefixes]] for fact in facts]
    before = [fact_output(model, 2, c, f["subject"]) for c, f in zip(contexts, facts, strict=True)]
    result = edit(model, hp, facts)
    for i, fact in enumerate(facts):
        delta = result.targets[0].delta[i].double()
        moved = fact_output(model, 2, contexts[i], fact["subject"]) - before[i]
        expected = float((moved @ delta).mean() / (delta @ delta))
        assert 0.001 < abs(expected) < 2
        assert result.diagnosis.facts[i].residual_share == pytest.approx(expected, abs=2e-4)
        assert result.diagnosis.facts[i].final_nll == pytest.approx(float(result.targets[0].final_nll[i]))
        assert (result.diagnosis.facts[i].prompt, result.diagnosis.facts[i].target) == (
            fact["prompt"],
            fact["target_new"],
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["Global", "MoTE/update"])
def test_relative_updates_are_those_of_the_weights(family: str, variant: str, data: Path) -> None:
    model, base = tiny_model(family), tiny_model(family)
    result = edit(model, hparams(data, variant), requests(3))
    assert [layer.layer for layer in result.diagnosis.layers] == [1, 2]
    for layer in result.diagnosis.layers:
        now, then = (MoELayerView(m).layers[layer.layer].experts.stacked(torch.float64) for m in (model, base))
        expected = (now - then).flatten(1).norm(dim=1) / then.flatten(1).norm(dim=1)
        assert 0 < len(layer.experts) <= 8
        for expert in layer.experts:
            assert expert.relative_update == pytest.approx(float(expected[expert.expert]), rel=1e-4)
            assert expert.null_space is not None
        if variant == "Global":
            assert {e.expert for e in layer.experts} == set(torch.nonzero(expected).flatten().tolist())
    assert result.seconds["diagnose"] > 0


def test_ranks_and_coverage_are_those_that_were_prepared(data: Path) -> None:
    model, editor = tiny_model(), make_editor(hparams(data), progress=False)
    prepared = editor.prepare(model, TOK)
    result = editor.edit(model, TOK, parse_requests(requests(3)))
    for layer in result.diagnosis.layers:
        for expert in layer.experts:
            assert expert.null_space == prepared.layers[layer.layer].null_space[expert.expert]
            assert expert.coverage == int(prepared.layers[layer.layer].coverage[expert.expert])
    free = edit(tiny_model(), plain_ridge(data), requests(3))
    assert {(e.null_space, e.coverage) for e in free.diagnosis.hit} == {(None, None)}


def test_fit_of_a_single_fact_is_that_of_the_ridge(data: Path) -> None:
    """With one key, ``F = k / (k + lambda) R`` for its squared norm k: fit, and one minus the shrinkage."""
    for ridge in (1e-3, 0.05, 1.0):
        hp = plain_ridge(data, layers=[2], lambda_reg=ridge, remember_edits=True)
        result = edit(tiny_model(), hp, requests(1))
        (layer,), (keys,) = result.diagnosis.layers, result.memory.keys[2]
        energy = float((keys.gate[..., None] * keys.key).double().square().sum())
        assert layer.fit == pytest.approx(energy / (energy + ridge), rel=1e-5)
        assert 1 - layer.shrinkage == pytest.approx(energy / (energy + ridge), rel=1e-5)


@pytest.mark.parametrize("variant", ["Global", "MoTE/update", "MoE-ROME"])
def test_measuring_changes_no_bit(variant: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, plain, facts = tiny_model().train(), tiny_model().train(), requests(3)
    generator = torch.get_rng_state()
    edit(seen, hparams(data, variant), facts)
    assert torch.equal(generator, torch.get_rng_state())

    def none(self: BatchSolve, start: int) -> None:
        self.shares = [None] * len(self.facts)

    monkeypatch.setattr(BatchSolve, "measure", none)
    edit(plain, hparams(data, variant), facts)
    assert_same_state(state_of(plain), state_of(seen))


def test_the_last_forward_runs_no_layer_that_it_need_not(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = tiny_model(), []
    for index in range(4):
        attention = model.model.layers[index].self_attn
        attention.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    original = BatchSolve.measure

    def counted(self: BatchSolve, start: int) -> None:
        ran.clear()
        original(self, start)

    monkeypatch.setattr(BatchSolve, "measure", counted)
    edit(model, hparams(data), requests(3))
    assert ran == [2]
    edit(model, hparams(data, "MoTE/update"), requests(3))
    assert ran == [1, 2]


# ---------------------------------------------------------------- planted cases, end to end


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["Global", "MoTE", "MoE-MEMIT", "MoEEdit-BCD"])
def test_a_good_edit_says_nothing(family: str, variant: str, data: Path) -> None:
    make = hparams if variant == "MoE-MEMIT" else plain_ridge
    result, found = told(teachable(family), make(data, variant, lambda_reg=1e-5, **STRONG), easy(2))
    assert found == [], result.warnings
    assert all(fact.reached and fact.residual_share > 0.9 for fact in result.diagnosis.facts)


POOLED = {"low_coverage": "pooled", "min_coverage": 10**6, "nullspace_relative": True}


@pytest.mark.parametrize("variant", ["Global", "MoTE/update", "MoTE/residual", "MoEEdit-BCD", "MoE-AlphaEdit"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_an_empty_null_space_speaks(variant: str, family: str, data: Path) -> None:
    """Statistics of full rank, and a relative threshold that leaves nothing of them."""
    model = teachable(family)
    before = state_of(model)
    result, found = told(model, hparams(data, variant, nullspace_threshold=1e-12, **POOLED, **STRONG), easy(2))
    assert NullSpaceWarning in found
    assert NoUpdateWarning in found
    assert not any(issubclass(kind, ResidualNotReachedWarning) for kind in found)
    assert all(expert.null_space == 0 for expert in result.diagnosis.hit)
    assert_same_state(before, state_of(model))


def test_one_empty_expert_is_named(data: Path) -> None:
    model, editor = teachable(), make_editor(plain_ridge(data, layers=[2], lambda_reg=1e-5, **STRONG), progress=False)
    whole = ExpertProjector(torch.zeros(24, 0, dtype=torch.float64), complement=True)
    prepared = editor.prepare(model, TOK)
    hit = [e.expert for e in editor.edit(model, TOK, parse_requests(easy(2))).diagnosis.hit]
    nothing = replace(whole, complement=False)
    space = NullSpace(tuple(nothing if expert == hit[0] else whole for expert in range(8)))
    layer = replace(prepared.layers[2], metric=space, null_space=tuple(space.ranks))
    editor.prepared = replace(prepared, layers={2: layer})
    editor.hparams = replace(editor.hparams, metric="nullspace")
    fresh = teachable()
    with pytest.warns(NullSpaceWarning, match=rf"1 of {len(hit)} experts .* \(layer 2\)"):
        editor.edit(fresh, TOK, parse_requests(easy(2)))


def test_experts_that_are_frozen_on_purpose(data: Path) -> None:
    hp = hparams(data, low_coverage="frozen", min_coverage=10**6, **STRONG)
    result, found = told(teachable(), hp, easy(2))
    assert found == [NoUpdateWarning]
    assert "min_coverage" in result.warnings[0]


def test_a_lambda_that_is_too_large_for_a_solution_that_is_shared_out(data: Path) -> None:
    _, found = told(teachable(), plain_ridge(data, "MoTE/update", lambda_reg=300.0, **STRONG), easy(2))
    assert found == [RidgeTooLargeWarning]


@pytest.mark.parametrize("variant", ["Global", "MoTE", "MoEEdit-BCD", "MoE-MEMIT"])
def test_a_lambda_that_is_too_large(variant: str, data: Path) -> None:
    """The value that the warning names makes the edit go through."""
    ridge = 1e6 if variant == "MoE-MEMIT" else 300.0
    make = hparams if variant == "MoE-MEMIT" else plain_ridge
    result, found = told(teachable(), make(data, variant, lambda_reg=ridge, **STRONG), easy(2))
    assert found == [RidgeTooLargeWarning], result.warnings
    better = float(result.warnings[0].rpartition("below ")[2].rstrip("."))
    result, found = told(teachable(), make(data, variant, lambda_reg=better / 4, **STRONG), easy(2))
    assert found == [], result.warnings


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
@pytest.mark.parametrize(("dtype", "ridge"), [(torch.bfloat16, 1e5), (torch.float16, 1e6), (torch.float32, 1e12)])
def test_an_update_that_rounding_swallows(family: str, dtype: torch.dtype, ridge: float, data: Path) -> None:
    hp = plain_ridge(data, lambda_reg=ridge, dtype=str(dtype).removeprefix("torch."), **STRONG)
    result, found = told(teachable(family, dtype=dtype), hp, easy(2))
    assert found == [RoundingWarning], result.warnings
    assert result.diagnosis.rounding_loss > 0.9
    assert result.diagnosis.dtype in result.warnings[0]


def test_facts_that_are_known(data: Path) -> None:
    """A target whose search needs no step leaves nothing to do."""
    targets = TargetVectors(
        torch.zeros(2, 32), torch.zeros(2), torch.zeros(2), torch.ones(2) > 0, torch.zeros(2).long(), torch.ones(2) > 0
    )
    result, found = told(teachable(), plain_ridge(data), easy(2), targets=targets)
    assert found == [KnownFactsWarning, NoUpdateWarning]
    assert "early_stop_loss" in result.warnings[1]
    assert [fact.residual_share for fact in result.diagnosis.facts] == [None, None]


def test_missed_targets_are_told_once_per_edit(data: Path) -> None:
    """... also where each request is solved for itself, and where the targets were given."""
    weak = {"v_num_grad_steps": 1, "v_lr": 0.01, "lambda_reg": 1e-6}
    result, found = told(teachable(), hparams(data, "MoE-ROME", **weak), easy(3))
    assert found == [TargetNotReachedWarning]
    assert "3 of 3 targets" in result.warnings[0]
    first = edit(teachable(), plain_ridge(data, **weak), easy(3))
    again, found = told(teachable(), plain_ridge(data, **weak), easy(3), targets=first.targets[0])
    assert (found, again.warnings) == ([TargetNotReachedWarning], first.warnings)
    cached, found = told(teachable(), plain_ridge(data, **weak, target_cache_dir=str(data / "z")), easy(3))
    assert (found, cached.warnings) == ([TargetNotReachedWarning], first.warnings)


def test_sequential_batches_each_speak_for_themselves(data: Path) -> None:
    model, hp = teachable(), plain_ridge(data, lambda_reg=300.0, remember_edits=True, **STRONG)
    first, _ = told(model, hp, easy(2))
    second, found = told(model, hp, easy(4)[2:], memory=first.memory)
    assert found == [RidgeTooLargeWarning]
    assert (first.diagnosis.remembered, second.diagnosis.remembered) == (0, 2)
    assert "2 keys that remember_edits keeps" in second.warnings[0]
    assert [fact.prompt for fact in second.diagnosis.facts] == [fact["prompt"] for fact in easy(4)[2:]]


def test_warnings_that_are_errors_leave_the_model_as_it_was(data: Path) -> None:
    model = teachable()
    before = state_of(model)
    for hp in (plain_ridge(data, lambda_reg=300.0, **STRONG), settings("MoE-FT", lr=1e-6)):
        with warnings.catch_warnings():
            warnings.simplefilter("error", EditingWarning)
            with pytest.raises(EditingWarning):
                make_editor(hp, progress=False).edit(model, TOK, parse_requests(easy(2)))
        assert_same_state(before, state_of(model))


# ---------------------------------------------------------------- methods that train


@pytest.mark.parametrize("method", ["MoE-FT", "MoE-FT-L", "MoE-LoRA", "AdaLoRA"])
def test_training_measures_each_fact(method: str) -> None:
    from baselines import answer_nll

    model = tiny_model()
    with torch.no_grad():
        before = answer_nll(model, requests(3))
    result, found = told(model, settings(method, lr=3e-3, num_steps=6), requests(3))
    with torch.no_grad():
        after = answer_nll(model, requests(3))
    for fact, old, new in zip(result.diagnosis.facts, before, after, strict=True):
        assert fact.initial_nll == pytest.approx(float(old), abs=1e-4)
        assert fact.final_nll == pytest.approx(float(new), abs=1e-4)
    assert {p.name for p in result.diagnosis.parameters} == {r.name for r in result.patch.reports}
    assert all(p.relative_update > 0 for p in result.diagnosis.parameters if p.name in result.patch.values)
    assert result.diagnosis.steps == 12
    assert set(found) <= {TargetNotReachedWarning, LossUnchangedWarning}


@pytest.mark.parametrize("method", ["MoE-FT", "MoE-FT-L", "MoE-LoRA", "AdaLoRA"])
def test_a_learning_rate_below_bfloat16(method: str) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    result, found = told(model, settings(method, dtype="bfloat16", lr=1e-9), requests(2))
    assert RoundingWarning in found
    assert LossUnchangedWarning not in found
    assert any("bfloat16" in text and "lr (1e-09)" in text for text in result.warnings)


@pytest.mark.parametrize("method", ["MoE-FT", "MoE-LoRA"])
def test_a_loss_that_hardly_changes(method: str) -> None:
    result, found = told(tiny_model("gpt_oss"), settings(method, lr=1e-6), requests(2))
    assert found == [TargetNotReachedWarning, LossUnchangedWarning]
    assert "num_steps (3)" in result.warnings[1]


@pytest.mark.parametrize("method", ["MoE-FT", "MoE-FT-L", "MoE-LoRA", "AdaLoRA"])
def test_training_that_stops_before_its_first_step(method: str) -> None:
    model = tiny_model()
    before = state_of(model)
    result, found = told(model, settings(method, early_stop_loss=100.0), requests(2))
    assert NoUpdateWarning in found
    assert result.diagnosis.steps == 0
    assert any("early_stop_loss (100)" in text for text in result.warnings)
    assert_same_state(before, state_of(model))


def test_unke_says_that_its_layer_does_not_follow() -> None:
    result, found = told(teachable(), settings("UnKE", lr=1e-7, **STRONG), easy(2))
    assert found == [ResidualNotReachedWarning], result.warnings
    assert "optim_num_step (4)" in result.warnings[0]
    good = settings("UnKE", lr=0.02, **(STRONG | {"optim_num_step": 200}))
    result, found = told(teachable(), good, easy(2))
    assert found == [], result.warnings
    lost = settings("UnKE", lr=1e-9, dtype="bfloat16", **STRONG)
    assert told(teachable(dtype=torch.bfloat16), lost, easy(2))[1] == [RoundingWarning]


def test_memoe_says_which_facts_it_did_not_learn(data: Path) -> None:
    values = {
        "alg_name": "MEMoE", "model_name": "tiny", "layers": [1], "dtype": "float32", "num_experts": 2, "steps": 2,
        "expert_width": 16, "locality_dataset": str(data / "corpus.txt"), "locality_weight": 0.0,
    }  # fmt: skip
    result, found = told(teachable(), hyperparams_class("MEMoE").from_dict(values), easy(3))
    assert found == [TargetNotReachedWarning]
    assert "steps (2)" in result.warnings[0]
    report = result.solver_reports[0]
    assert [fact.final_nll for fact in result.diagnosis.facts] == list(report.fact_nll)
    assert sum(report.fact_nll) / 3 == pytest.approx(report.nll, rel=1e-5)
    assert (result.diagnosis.changed, result.diagnosis.layers) == (None, ())


# ---------------------------------------------------------------- every way in, and files


def test_every_call_warns(data: Path) -> None:
    hp = plain_ridge(data, lambda_reg=300.0, **(STRONG | {"v_num_grad_steps": 3}))
    columns = {"prompts": "prompt", "target_new": "target_new", "subject": "subject"}
    given = {name: [fact[key] for fact in easy(2)] for name, key in columns.items()}
    for call in ("edit", "batch_edit", "normal_edit"):
        options = {} if call == "normal_edit" else {"verbose": False}
        model = teachable()
        with pytest.warns(RidgeTooLargeWarning):
            getattr(MoEEditor(hp, model, TOK), call)(**given, **options)
    with pytest.warns(RidgeTooLargeWarning):
        apply_global_to_model(teachable(), TOK, easy(2), hp)


def test_patches_carry_them(data: Path, tmp_path: Path) -> None:
    for number, hp in enumerate((plain_ridge(data, lambda_reg=300.0, **STRONG), settings("MoE-FT", lr=1e-6))):
        result, _ = told(teachable(), hp, easy(2))
        path = tmp_path / f"{number}.safetensors"
        result.patch.save(path)
        loaded = load_patch(path)
        assert loaded.warnings == result.warnings != []
        assert loaded.metadata["diagnosis"] == result.diagnosis.to_dict()
        assert loaded.metadata["warnings"] == result.warnings


def test_compare_keeps_them_by_row(data: Path) -> None:
    from tiny_comparison import tiny_records

    from easyedit_moe.facts.records import parse_records

    edits = zip(tiny_records(), WORDS, strict=True)
    found = parse_records(
        [r | {"requested_rewrite": r["requested_rewrite"] | {"target_new": {"str": w}}} for r, w in edits]
    )
    task = Task(
        teachable(), TOK, found.records, found.protocol, 2, {"model": "tiny", "edits": 4, "protocol": "counterfact"}
    )
    bad, good = (plain_ridge(data, lambda_reg=ridge, **STRONG) for ridge in (300.0, 1e-5))
    with warnings.catch_warnings():
        warnings.simplefilter("error", EditingWarning)
        rows = compare(task, [bad, good], labels=("bad", "good")).to_dict()["rows"]
    assert rows[0]["warnings"] == rows[2]["warnings"] == []
    assert len(rows[1]["warnings"]) == 2
    assert all("lambda_reg 300" in text for text in rows[1]["warnings"])


# ---------------------------------------------------------------- the bundled model


@pytest.fixture(scope="module")
def bundled() -> Any:
    return [record.request for record in load_records("factworld").records[200:208]]


@pytest.mark.parametrize("method", ["Global", "MoTE"])
def test_a_threshold_that_leaves_nothing_of_the_bundled_model(method: str, bundled: Any, tmp_path: Path) -> None:
    """Edits that changed no score and no routing, without a word."""
    model, tok = load_model("factworld", "float32")
    before = state_of(model)
    changes = {"nullspace_relative": True, "nullspace_threshold": 1e-12, "v_num_grad_steps": 2}
    hp = load_hyperparams(f"{method}/factworld", stats_dir=str(tmp_path), **changes)
    editor = make_editor(hp, progress=False)
    with pytest.warns(NullSpaceWarning, match="nullspace_threshold"):
        result = editor.edit(model, tok, bundled)
    assert any("The update is zero" in text for text in result.warnings)
    assert_same_state(before, state_of(model))


def test_equal_scores_and_routing_have_their_reason_in_the_row(tmp_path: Path) -> None:
    task = load_task("factworld", "factworld", 4, 200, 2, "float32", "cpu")
    changes = {"nullspace_relative": True, "nullspace_threshold": 1e-12, "v_num_grad_steps": 2}
    before, row = compare(task, [load_hyperparams("Global/factworld", stats_dir=str(tmp_path), **changes)]).rows
    assert row.scores == before.scores
    assert row.routing["edit"]["mean"] == row.routing["preservation"]["mean"] == 100
    assert sum("nullspace_threshold" in text for text in row.warnings) == 4  # two batches, the cause and the effect
    assert before.warnings == ()


def test_a_good_edit_of_the_bundled_model_says_nothing(bundled: Any, tmp_path: Path) -> None:
    model, tok = load_model("factworld", "float32")
    editor = make_editor(load_hyperparams("Global/factworld", stats_dir=str(tmp_path)), progress=False)
    result = editor.edit(model, tok, bundled[:3])
    assert result.warnings == []
    assert all(fact.reached and fact.residual_share > 0.5 for fact in result.diagnosis.facts)
