"""Evaluation before and after patches: the same numbers as by hand, one table, and a model that is as it was."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from baselines import TOK, settings
from baselines import edit as train
from solving_editors import edit as solve
from solving_editors import plain_ridge
from tiny import assert_same_state, chat_tokenizer, requests, state_of, tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from easyedit_moe import load_hyperparams, load_model, make_editor
from easyedit_moe.commands.app import app
from easyedit_moe.errors import DataError, DependencyError, PatchError
from easyedit_moe.evaluation import metrics
from easyedit_moe.evaluation.neighbours import answered
from easyedit_moe.evaluation.portability import portability
from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.evaluation.summary import Summary
from easyedit_moe.facts.records import load_records
from easyedit_moe.patches.files import load_patch
from easyedit_moe.patches.tensors import TensorPatch
from easyedit_moe.workflow import evaluate as evaluating
from easyedit_moe.workflow.evaluate import Evaluation, Measure, evaluate
from easyedit_moe.workflow.evaluation_report import cells, markdown, write_evaluation


@pytest.fixture
def data(tmp_path: Path) -> Path:
    neighbour = "Zoë lives in => Rome | What is the twin city of Lyon?"
    lines = ["prompt;subject;target_new;rephrase;neighbours;portability"]
    for fact in requests(3):
        cells = (fact["prompt"], fact["subject"], fact["target_new"], f"We know: {fact['prompt']}", neighbour)
        lines.append(";".join([*cells, "The quick brown => fox"]))
    path = tmp_path / "records.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def saved_patch(
    model: Any, folder: Path, kind: str, count: int = 3, name: str = "patch", parent: str | None = None
) -> Path:
    """A patch on disk; the model is as before."""
    if kind == "tensors":
        patch = train(model, settings("MoE-FT", num_steps=12, lr=1e-2), requests(count)).patch
    else:
        patch = solve(
            model,
            plain_ridge(
                folder, v_num_grad_steps=40, v_lr=2.0, clamp_norm_factor=1000.0, v_weight_decay=0.0, lambda_reg=1e-6
            ),
            requests(count),
        ).patch
    path = folder / f"{name}.safetensors"
    patch.save(path)
    patch.revert(model)
    return path


def by_name(result: Evaluation, column: str = "before") -> dict[str, float]:
    return {measure.name: getattr(measure, column).mean for measure in result.measures}


@pytest.mark.parametrize("kind", ["tensors", "factors"])
def test_the_numbers_are_those_of_each_model(kind: str, data: Path, tmp_path: Path) -> None:
    model = tiny_model()
    patch = saved_patch(model, tmp_path, kind)
    state = state_of(model)
    result = evaluate((model, TOK), [patch], data, progress=False)
    assert_same_state(state, state_of(model))
    records = answered(model, TOK, load_records(data).records)
    expected = metrics.evaluate(model, TOK, records, "token_accuracy"), portability(model, TOK, records)
    for column in ("before", "after"):
        scores, follows = expected
        found = by_name(result, column)
        assert found == {
            "efficacy": scores.efficacy.mean,
            "generalisation": scores.generalisation.mean,
            "specificity": scores.specificity.mean,
            "utility": scores.utility.mean,
            "exact match": scores.exact_match.mean,
            "portability": follows.mean,
        }
        edited = tiny_model()
        load_patch(patch).apply(edited)
        expected = metrics.evaluate(edited, TOK, records, "token_accuracy"), portability(edited, TOK, records)
    assert by_name(result, "after") != by_name(result)
    assert {measure.group for measure in result.measures} == {"records"}
    assert (result.provenance["records"], result.provenance["patches"]) == (3, [str(patch)])


def test_without_a_patch_there_is_one_column(data: Path) -> None:
    result = evaluate((tiny_model(), TOK), data=data)
    assert all(measure.after is None for measure in result.measures)
    assert cells(result.measures[0])[4:] == ["-", "-", "-", "3"]


def test_patches_are_applied_in_order_and_taken_back(data: Path, tmp_path: Path) -> None:
    model = tiny_model()
    state = state_of(model)
    paths = [saved_patch(model, tmp_path, "tensors", 1, "first")]
    TensorPatch.load(paths[0]).apply(model)
    paths.append(saved_patch(model, tmp_path, "tensors", 3, "second"))
    whole = metrics.evaluate(model, TOK, load_records(data).records, "token_accuracy").efficacy.mean
    model = tiny_model()
    with pytest.raises(PatchError):
        evaluate((model, TOK), paths[::-1], data)
    assert_same_state(state, state_of(model))
    result = evaluate((model, TOK), paths, data)
    assert_same_state(state, state_of(model))
    one = evaluate((model, TOK), paths[:1], data)
    second = TensorPatch.load(paths[1])
    TensorPatch.load(paths[0]).apply(model)
    second.apply(model)
    records = answered(tiny_model(), TOK, load_records(data).records)
    both = metrics.evaluate(model, TOK, records, "token_accuracy")
    assert by_name(result, "after")["efficacy"] == both.efficacy.mean
    assert by_name(one, "after") != by_name(result, "after")
    assert whole != both.efficacy.mean or both.efficacy.mean == 100


def test_a_patch_that_does_not_fit_stops_before_anything_is_measured(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = saved_patch(tiny_model(), tmp_path, "factors")
    model = tiny_model("gpt_oss")
    state = state_of(model)
    monkeypatch.setattr(evaluating.metrics, "evaluate", lambda *_: pytest.fail("measured"))
    with pytest.raises(PatchError):
        evaluate((model, TOK), [patch], data)
    assert_same_state(state, state_of(model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_restored_whatever_happens(
    error: type[BaseException], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    patch = saved_patch(model, tmp_path, "tensors")
    state, calls = state_of(model), []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise error("stop")
        return metrics.evaluate(*arguments, **options)

    monkeypatch.setattr(evaluating, "metrics", type("M", (), {"evaluate": staticmethod(interrupted)}))
    with pytest.raises(error, match="stop"):
        evaluate((model, TOK), [patch], data)
    assert_same_state(state, state_of(model))


def test_nothing_to_measure() -> None:
    with pytest.raises(DataError, match="nothing to measure"):
        evaluate((tiny_model(), TOK))


def test_files_are_strict_json(tmp_path: Path) -> None:
    nothing = Summary(float("nan"), float("inf"), 0)
    result = Evaluation((Measure("records", "efficacy", Summary(5.0, 1.0, 2), nothing, "counterfact"),), {"model": "x"})
    paths = write_evaluation(result, tmp_path / "out")
    content = json.loads(paths[0].read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["measures"][0]["after"] == {
        "mean": None, "stderr": None, "count": 0, "low": None, "high": None, "interval": "",
    }  # fmt: skip
    assert paths[1].read_text() == markdown(result)
    assert "| records | counterfact | efficacy | 5.0 ± 1.0 |" in markdown(result)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    model, tok = load_model("factworld", "float32")
    facts = [record.request for record in load_records("factworld").records[:2]]
    hparams = load_hyperparams("MoE-FT/factworld", num_steps=2)
    make_editor(hparams, progress=False).edit(model, tok, facts).patch.save(tmp_path / "patch.safetensors")
    table = "prompt,subject,target_new,ground_truth\n"
    table += "".join(f"{f.prompt},{f.subject},{f.target_new},{f.ground_truth}\n" for f in facts)
    (tmp_path / "facts.csv").write_text(table)
    files = ["--data", f"{tmp_path}/facts.csv", "--patch", f"{tmp_path}/patch.safetensors", "--out", f"{tmp_path}/out"]
    done = CliRunner().invoke(app, ["evaluate", "--model", "factworld", *files])
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    for measure in content["measures"]:
        assert any(
            measure["name"] in line and f"{measure['after']['mean']:.1f}" in line for line in done.output.split("\n")
        )
    assert content["provenance"]["protocol"] == "counterfact"
    assert content["provenance"]["dtype"] == "float32"
    wrong = CliRunner().invoke(app, ["evaluate", "--data", f"{tmp_path}/facts.csv", "--patch", f"{tmp_path}/facts.csv"])
    assert (wrong.exit_code, "PatchError" in wrong.output) == (2, True)
    assert "Example: easyedit-moe evaluate" in CliRunner().invoke(app, ["evaluate", "--help"]).output


def test_without_the_harness_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(DependencyError, match=r"pip install 'easyedit-moe\[eval\]'"):
        evaluate((tiny_model(), TOK), tasks=["hellaswag"])
    done = CliRunner().invoke(app, ["evaluate", "--tasks", "hellaswag"])
    assert done.exit_code == 2
    assert "easyedit-moe[eval]" in done.output.replace("\n", "")


# ---------------------------------------------------------------- tasks, by lm-evaluation-harness


@pytest.fixture
def tasks_dir(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [
        {"question": fact["prompt"], "choices": [fact["ground_truth"], fact["target_new"]], "answer": number % 2}
        for number, fact in enumerate(requests(5))
    ]
    (folder / "towns.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    task = {
        "task": "towns",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "towns.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "towns.yaml").write_text(yaml.safe_dump(task))
    return folder


def accuracy(model: Any) -> float:
    """The task's accuracy by hand: the likelier choice as a whole."""
    right = []
    for number, fact in enumerate(requests(5)):
        choices = [fact["ground_truth"], fact["target_new"]]
        scores = score_targets(model, TOK, [(fact["prompt"], choice) for choice in choices])
        total = [score.nll * len(score.labels) for score in scores]
        right.append(total.index(min(total)) == number % 2)
    return sum(right) / len(right)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_task_of_ones_own(family: str, tasks_dir: Path, tmp_path: Path) -> None:
    model, tok = tiny_model(family), tiny_tokenizer(padding_side="left", pad=False)
    model.train()
    patch = saved_patch(model, tmp_path, "tensors")
    state, random_state = state_of(model), (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    result = evaluate((model, tok), [patch], tasks=["towns"], tasks_dir=tasks_dir, progress=False)
    assert_same_state(state, state_of(model))
    assert (tok.pad_token, tok.padding_side) == (None, "left")
    assert random.getstate() == random_state[0]
    assert np.random.get_state()[1].tolist() == random_state[1]
    assert torch.equal(torch.get_rng_state(), random_state[2])
    (measure,) = result.measures
    assert (measure.group, measure.name, measure.before.count) == ("towns", "acc", 5)
    edited = tiny_model(family)
    load_patch(patch).apply(edited)
    assert (measure.before.mean, measure.after.mean) == (accuracy(tiny_model(family)), accuracy(edited))
    assert measure.before.mean != measure.after.mean
    assert result.provenance["versions"]["lm_eval"]


def test_records_and_tasks_in_one_table(tasks_dir: Path, data: Path) -> None:
    result = evaluate((tiny_model(), TOK), data=data, tasks=["towns"], tasks_dir=tasks_dir, limit=2, progress=False)
    assert [measure.group for measure in result.measures] == ["records"] * 6 + ["towns"]
    assert result.measures[-1].before.count == 2


def test_tasks_that_cannot_be_run(tasks_dir: Path) -> None:
    model = (tiny_model(), TOK)
    with pytest.raises(DataError, match=r"Unknown task 'town'\. Did you mean 'towns'\?"):
        evaluate(model, tasks=["town"], tasks_dir=tasks_dir)
    with pytest.raises(DataError, match=r"folder of tasks .* does not exist"):
        evaluate(model, tasks=["towns"], tasks_dir=tasks_dir / "no")
    with pytest.raises(DataError, match="limit must be at least 1"):
        evaluate(model, tasks=["towns"], tasks_dir=tasks_dir, limit=0)
    (tasks_dir / "towns.jsonl").unlink()
    with pytest.raises(DataError, match="The tasks towns can't be loaded"):
        evaluate(model, tasks=["towns"], tasks_dir=tasks_dir)


def test_tasks_in_a_chat(tasks_dir: Path) -> None:
    """The likelier choice behind the template that the harness applies, by hand; the harness puts a space before it."""
    model, tok = tiny_model(), chat_tokenizer()
    (measure,) = evaluate((model, tok), tasks=["towns"], tasks_dir=tasks_dir, progress=False, chat=True).measures
    right = []
    for number, fact in enumerate(requests(5)):
        framed = f"<user>{fact['prompt']}\n<assistant>"
        ids = tok(framed)["input_ids"]
        losses = []
        for choice in (fact["ground_truth"], fact["target_new"]):
            answer = tok(framed + " " + choice)["input_ids"][len(ids) :]
            with torch.no_grad():
                logp = model(torch.tensor([[*ids, *answer]])).logits[0].log_softmax(-1)
            losses.append(
                -float(logp[torch.arange(len(ids) - 1, len(ids) + len(answer) - 1), torch.tensor(answer)].sum())
            )
        right.append(losses.index(min(losses)) == number % 2)
    assert measure.before.mean == sum(right) / 5
