"""Edits from Python: batches, adapters, and a model that is as before when anything goes wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from solving_editors import TOK, plain_ridge
from tiny import assert_same_state, facts, state_of, tiny_model

from easyedit_moe.adapters.attachment import find_adapter
from easyedit_moe.editors import statistics_plan
from easyedit_moe.editors.statistics_plan import plan_statistics
from easyedit_moe.errors import PatchError, RequestError
from easyedit_moe.evaluation.generation import Sampling, generate_answers
from easyedit_moe.facts.tokens import encode_text
from easyedit_moe.hparams import MEMoEHyperParams
from easyedit_moe.patches.files import load_patch
from easyedit_moe.statistics.moments import LayerMoments
from easyedit_moe.workflow import edit as editing
from easyedit_moe.workflow.ask import ask
from easyedit_moe.workflow.edit import edit
from easyedit_moe.workflow.inspect import inspect
from easyedit_moe.workflow.session import Loading, load, loading_options

STRONG = {"v_num_grad_steps": 40, "v_lr": 2.0, "clamp_norm_factor": 1000.0, "v_weight_decay": 0.0, "lambda_reg": 1e-6}


def strong(folder: Path, **changes: Any) -> Any:
    return plain_ridge(folder, **(STRONG | changes))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_batches_make_one_patch(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    before = state_of(model)
    report = edit(facts(3), (model, TOK), hparams=strong(tmp_path), out=tmp_path / "out", batch_size=2, progress=False)
    assert [fact.batch for fact in report.facts] == [0, 0, 1]
    assert report.changed == 3
    edited = state_of(model)
    patch = load_patch(tmp_path / "out" / "patch.safetensors")
    assert (patch.id, len(patch.metadata["merged"])) == (report.patch_id, 2)
    for one in reversed(report.patches):
        one.revert(model)
    assert_same_state(before, state_of(model))
    patch.apply(model)
    assert_same_state(edited, state_of(model))


@pytest.mark.parametrize("where", ["ask_all", "save_edit"])
def test_whatever_fails_the_model_is_as_before_and_nothing_is_written(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = tiny_model(), []
    before, right = state_of(model), getattr(editing, where)

    def failing(*args: Any) -> Any:
        calls.append(1)
        if where == "save_edit" or len(calls) == 2:
            raise KeyboardInterrupt
        return right(*args)

    monkeypatch.setattr(editing, where, failing)
    with pytest.raises(KeyboardInterrupt):
        edit(facts(2), (model, TOK), hparams=strong(tmp_path), out=tmp_path / "out", progress=False)
    assert_same_state(before, state_of(model))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("batch_size", [3, 2, 1])
def test_an_adapter_is_saved_beside_the_base_and_found_again(batch_size: int, tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    TOK.save_pretrained(tmp_path / "base")
    hp = MEMoEHyperParams.from_dict({
        "alg_name": "MEMoE", "model_name": "tiny", "layers": [1], "dtype": "bfloat16", "steps": 5,
        "locality_weight": 0.0,
    })  # fmt: skip
    report = edit(facts(3), str(tmp_path / "base"), "MEMoE", hp, tmp_path / "out", ("patch", "checkpoint"), batch_size,
                  progress=False)  # fmt: skip
    assert [fact.batch for fact in report.facts] == [number // batch_size for number in range(3)]
    adapter = tmp_path / "out" / "memoe_adapter.safetensors"
    assert [fact["prompt"] for fact in inspect(adapter)["facts"]] == [fact.prompt for fact in facts(3)]
    folder = tmp_path / "out" / "checkpoint"
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()
    net, _ = load(str(folder), Loading("bfloat16", "cpu"))
    assert find_adapter(net) is not None
    wanted = [fact.change.after.answer for fact in report.facts]
    prompts = [fact.prompt for fact in facts(3)]
    beside = ask(prompts, str(tmp_path / "base"), [adapter], progress=False)
    assert [one.after.text for one in beside] == wanted
    assert [one.before.text for one in ask(prompts, str(folder), progress=False)] == wanted


def test_asking_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = tiny_model()
    report = edit(facts(2), (model, TOK), hparams=strong(tmp_path), out=tmp_path / "out", progress=False)
    for one in reversed(report.patches):
        one.revert(model)
    before = state_of(model)
    path, prompts = tmp_path / "out" / "patch.safetensors", [fact.prompt for fact in facts(2)]
    found = ask(prompts, (model, TOK), [path], progress=False)
    assert [one.after.text for one in found] == [fact.change.after.answer for fact in report.facts]
    assert_same_state(before, state_of(model))
    load_patch(path).apply(model)
    edited = state_of(model)
    with pytest.raises(PatchError):
        ask(prompts, (model, TOK), [path], progress=False)
    assert_same_state(edited, state_of(model))
    with pytest.raises(RequestError, match="Prompt 1 is blank"):
        ask(["a", " "], (model, TOK), progress=False)


def test_the_dtype_is_the_patches_else_the_checkpoints(tmp_path: Path) -> None:
    tiny_model().to(torch.float16).save_pretrained(tmp_path / "base")
    model = tiny_model()
    edit(facts(1), (model, TOK), hparams=strong(tmp_path), out=tmp_path / "out", progress=False)
    patch = load_patch(tmp_path / "out" / "patch.safetensors")
    base = str(tmp_path / "base")
    assert loading_options(base).dtype == "float16"
    assert loading_options(base, [patch]).dtype == "float32"
    assert loading_options(base, [patch], Loading("bfloat16")).dtype == "bfloat16"


def test_greedy_answers_are_those_of_generate_alone() -> None:
    model = tiny_model().train()
    prompts = [*(fact.prompt for fact in facts(3)), "A", "A b c"]
    state, random = state_of(model), torch.get_rng_state()
    found = generate_answers(model, TOK, prompts, 5, batch_size=2)
    assert_same_state(state, state_of(model))
    assert torch.equal(torch.get_rng_state(), random)
    model.eval()
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([encode_text(TOK, prompt)])
        plain = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert list(answer.ids) == plain[0, ids.shape[1] :].tolist()


def test_sampled_answers_depend_on_the_seed_alone() -> None:
    model = tiny_model()
    one, same, other = (
        generate_answers(model, TOK, ["A", "B"], 8, sampling=Sampling(2.0, 1.0, seed)) for seed in (1, 1, 2)
    )
    assert one == same != other
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"temperature": float("nan")}):
        with pytest.raises(RequestError, match="must"):
            Sampling(**wrong)


def test_statistics_are_as_large_as_planned(tmp_path: Path) -> None:
    hp = strong(tmp_path, metric="nullspace", mom2_dataset="x", mom2_n_samples=10, coverage_target=None)
    plan = plan_statistics(hp, tiny_model())
    assert plan is not None
    layout = tiny_model().config
    e, h, d = layout.num_experts, layout.moe_intermediate_size, layout.hidden_size
    moments = LayerMoments(torch.zeros(e, h, h), torch.zeros(e, dtype=torch.long), torch.zeros(d, d), 1)
    bytes_of = sum(t.numel() * t.element_size() for t in (moments.keys, moments.counts, moments.output))
    assert plan.disk_bytes == bytes_of * len(hp.layers)
    assert (plan.least_tokens, plan.most_tokens) == (None, 10 * hp.max_length)
    assert plan.seconds(1e9) == (plan.most_tokens * plan.flops_per_token / 1e9,) * 2
    even = plan_statistics(replace(hp, coverage_target=8.0, mom2_n_samples=10**6), tiny_model())
    assert even.least_tokens == 8 * h * e // layout.num_experts_per_tok
    assert plan_statistics(strong(tmp_path), tiny_model()) is None
    assert statistics_plan.matmul_speed(seconds=0.01) > 0
