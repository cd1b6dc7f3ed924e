"""What is longer than the model's context is refused at once, wherever it comes in, and before anything is edited."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from solving_editors import hparams, plain_ridge
from tiny import assert_same_state, chat_tokenizer, facts, requests, state_of, tiny_model, tiny_tokenizer
from torch import nn

from easyedit_moe.comparison.compare import compare
from easyedit_moe.comparison.task import Task
from easyedit_moe.editor import MoEEditor
from easyedit_moe.editors import make_editor
from easyedit_moe.errors import RequestError
from easyedit_moe.evaluation.context import check_fit
from easyedit_moe.evaluation.generation import generate_answers
from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.facts.records import EvaluationRecord
from easyedit_moe.facts.tokens import encode_pair
from easyedit_moe.workflow.ask import ask
from easyedit_moe.workflow.edit import edit

pytestmark = pytest.mark.usefixtures("no_editing_warnings")
LONG = "Angola is in " * 60
HUGE = "Angola is in " * 1600
CONTEXT = 128


def no_forward(model: nn.Module) -> nn.Module:
    """The model, which must not be run."""

    def fail(*arguments: Any) -> None:
        raise AssertionError("nothing is to be computed")

    model.register_forward_pre_hook(fail)
    return model


def with_long(place: str) -> dict[str, Any]:
    """A request, one of whose prompts is too long."""
    request: dict[str, Any] = {**requests(2)[1]}
    if place == "prompt":
        request["prompt"] = LONG + request["prompt"]
    elif place == "target_new":
        request["target_new"] = LONG
    elif place == "rephrase_prompt":
        request["rephrase_prompt"] = LONG
    else:
        request[place] = {"some": {"prompt": ["Lyon is in", LONG], "ground_truth": ["France", "Africa"]}}
    return request


@pytest.mark.parametrize("place", ["prompt", "target_new", "rephrase_prompt", "locality", "portability"])
@pytest.mark.parametrize("call", ["edit_requests", "batch_edit", "edit", "generate_edit"])
def test_all_is_refused_before_the_first_edit(call: str, place: str, data: Path) -> None:
    editor = MoEEditor(plain_ridge(data, batch_size=1), no_forward(tiny_model()), tiny_tokenizer())
    before = state_of(editor.model)
    given = [requests(1)[0], with_long(place)]
    with pytest.raises(RequestError, match=r"tokens with its answer; the model's context has 128"):
        getattr(editor, call)(requests=given, sequential_edit=True)
    assert not editor.patches
    assert_same_state(before, state_of(editor.model))


def test_a_context_prefix_counts(data: Path) -> None:
    model = no_forward(tiny_model())
    hp = hparams(data, context_prefixes=["A quiet harbour, an empty market. " * 8])
    with pytest.raises(RequestError, match="context has 128"):
        make_editor(hp, progress=False).edit(model, tiny_tokenizer(), facts(1))


@pytest.mark.parametrize(
    "run",
    [
        lambda model, tok: score_targets(model, tok, [("Lyon is in", "France"), (HUGE, "Africa")]),
        lambda model, tok: generate_answers(model, tok, ["Lyon is in", HUGE]),
        lambda model, tok: ask(["Lyon is in", HUGE], (model, tok)),
        lambda model, tok: check_fit(model, tok, [("Lyon is in", HUGE)]),
    ],
)
def test_twenty_thousand_characters_cost_milliseconds(run: Callable[..., Any]) -> None:
    model, tok = no_forward(tiny_model()), tiny_tokenizer()
    assert len(HUGE) > 20_000
    begun = time.process_time()
    with pytest.raises(RequestError, match="context has 128"):
        run(model, tok)
    assert time.process_time() - begun < 0.2


@pytest.mark.parametrize("chat", [False, True])
def test_the_border_is_exact(chat: bool) -> None:
    model, tok = tiny_model(), chat_tokenizer()
    prompt = next(
        text
        for text in ("Ana" + " Ana" * n for n in range(CONTEXT, 0, -1))
        if sum(map(len, encode_pair(tok, text, "Rome", chat=chat))) - 1 <= CONTEXT
    )
    assert sum(map(len, encode_pair(tok, prompt, "Rome", chat=chat))) - 1 == CONTEXT
    assert score_targets(model, tok, [(prompt, "Rome")], chat=chat)
    with pytest.raises(RequestError, match="has 129 tokens"):
        score_targets(model, tok, [(prompt + " Ana", "Rome")], chat=chat)


def test_what_is_cut_is_not_refused() -> None:
    assert score_targets(tiny_model(), tiny_tokenizer(), [(LONG, "Africa")], max_length=32)


def test_an_answer_ends_with_the_context() -> None:
    model, tok = tiny_model(), tiny_tokenizer()
    prompt = "Ana" + " Ana" * 100
    room = CONTEXT - len(tok(prompt)["input_ids"]) + 1
    (answer,) = generate_answers(model, tok, [prompt], max_new_tokens=500)
    assert len(answer.ids) == room or answer.ended


def test_a_model_that_says_nothing_of_its_context() -> None:
    model = tiny_model()
    del model.config.max_position_embeddings
    check_fit(model, tiny_tokenizer(), [(HUGE, "Africa")])


def test_the_edit_command_leaves_such_facts_out(data: Path) -> None:
    model, tok = tiny_model(), tiny_tokenizer()
    records = [EvaluationRecord(facts(1)[0], (), ()), EvaluationRecord(facts(2)[1], (LONG,), ())]
    report = edit(records, (model, tok), hparams=plain_ridge(data), progress=False)
    assert [one.number for one in report.refused] == [1]
    assert "context has 128" in report.refused[0].reason
    assert len(report.facts) == 1


def test_a_comparison_stops_before_the_first_forward(data: Path) -> None:
    records = [EvaluationRecord(facts(2)[1], (), ((LONG, "Africa"),))]
    task = Task(no_forward(tiny_model()), tiny_tokenizer(), records, "counterfact", 1, {})
    with pytest.raises(RequestError, match="context has 128"):
        compare(task, [plain_ridge(data)], progress=False)
