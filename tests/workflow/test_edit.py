"""Edits from Python: batches, adapters, and a model that is as before when anything goes wrong."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from baselines import settings
from solving_editors import TOK, plain_ridge
from tiny import assert_same_state, chat_tokenizer, facts, state_of, tiny_model

from easyedit_moe.adapters.attachment import find_adapter
from easyedit_moe.editors import statistics_plan
from easyedit_moe.editors.statistics_plan import plan_statistics
from easyedit_moe.errors import DataError, EditingWarning, PatchError, RequestError
from easyedit_moe.evaluation.generation import Sampling, generate_answers
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.facts.tokens import encode_pair, encode_text
from easyedit_moe.hparams import MEMoEHyperParams
from easyedit_moe.patches.files import load_patch
from easyedit_moe.statistics.moments import LayerMoments
from easyedit_moe.workflow import edit as editing
from easyedit_moe.workflow.ask import ask
from easyedit_moe.workflow.edit import edit
from easyedit_moe.workflow.edit_outcome import Change
from easyedit_moe.workflow.inspect import inspect
from easyedit_moe.workflow.measuring import Said, ask_all
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


def test_an_answer_counts_by_as_many_tokens_as_the_wanted_one_has() -> None:
    def said(answer: str, opening: str) -> Said:
        return Said(answer, opening, 0.1, 0.0, False)

    same = Change("Ana lives in", "Rome", said("Vienna, and sings", "Vienna"), said("Vienna and paints", "Vienna"))
    other = Change("Ana lives in", "Rome", said("Vienna", "Vienna"), said("Rome", "Rome"))
    assert (same.changed, other.changed) == (False, True)
    model = tiny_model()
    asked = [("Danielle Darrieux speaks", "Polish"), ("Danielle Darrieux speaks", "Polish and French")]
    for pair, found in ask_all(model, TOK, asked, max_new_tokens=8).items():
        count = len(encode_pair(TOK, *pair)[1])
        ids = generate_answers(model, TOK, [pair[0]], 8)[0].ids
        assert found.opening == TOK.decode(list(ids[:count]), skip_special_tokens=True).strip()


@pytest.mark.parametrize("method", ["MoE-FT", "MoE-FT-L", "MoE-LoRA", "AdaLoRA"])
def test_facts_without_a_subject(method: str) -> None:
    facts = [EditRequest("The quick brown", None, "dog")]
    report = edit(facts, (tiny_model(), TOK), hparams=settings(method, num_steps=2), progress=False)
    assert not report.refused
    with pytest.raises(DataError, match="subject"):
        edit(facts, (tiny_model(), TOK), hparams=settings("MoE-FT", experts="routed"), progress=False)


def test_a_patch_is_asked_as_it_was_made(tmp_path: Path) -> None:
    model, tok = tiny_model(), chat_tokenizer()
    hp = settings("MoE-FT", num_steps=8, lr=1e-2, chat=True)
    report = edit(facts(1), (model, tok), hparams=hp, out=tmp_path / "chat", progress=False)
    turn = report.provenance["chat_turn"]
    assert (turn["before"], turn["after"]) == ("<user>", "\n<assistant>")
    report.patches[0].revert(model)
    path, prompt = tmp_path / "chat" / "patch.safetensors", facts(1)[0].prompt
    wanted = report.facts[0].change.after.answer
    with warnings.catch_warnings():
        warnings.simplefilter("error", EditingWarning)
        (found,) = ask([prompt], (model, tok), [path], progress=False)
        assert ask([prompt], (model, tok), progress=False)[0].before == generate_answers(model, tok, [prompt])[0]
    assert found.after is not None
    assert found.after.text == wanted
    with pytest.warns(EditingWarning, match="made in a chat, and is asked as plain text"):
        (plain,) = ask([prompt], (model, tok), [path], chat=False, progress=False)
    assert plain.before == generate_answers(model, tok, [prompt])[0]
    other = edit(facts(1), (model, tok), hparams=settings("MoE-FT", num_steps=2), out=tmp_path / "text", progress=False)
    assert "chat_turn" not in other.provenance
    other.patches[0].revert(model)
    with pytest.warns(EditingWarning, match="made on plain text, and is asked in a chat"):
        ask([prompt], (model, tok), [tmp_path / "text" / "patch.safetensors"], chat=True, progress=False)


def test_a_template_that_writes_the_date_is_told(tmp_path: Path) -> None:
    tok = chat_tokenizer(template="{{ strftime_now('%Y') }}<user>{{ messages[0]['content'] }}\n<assistant>")
    with pytest.warns(EditingWarning, match="today's date"):
        edit(facts(1), (tiny_model(), tok), hparams=settings("MoE-FT", num_steps=1, chat=True), progress=False)
    with pytest.raises(RequestError, match="no chat template"):
        edit(facts(1), (tiny_model(), TOK), hparams=settings("MoE-FT", chat=True), progress=False)
