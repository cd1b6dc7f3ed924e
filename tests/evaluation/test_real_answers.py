from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from easyedit_moe.errors import RequestError
from easyedit_moe.evaluation import real_answers as real
from easyedit_moe.evaluation.generation import Answer
from easyedit_moe.evaluation.real_answers import RealAnswers, contains, plain, real_answers, until_stop, with_judge
from easyedit_moe.facts.records import EvaluationRecord
from easyedit_moe.facts.requests import EditRequest


def record(prompt: str, target: str, *paraphrases: str) -> EvaluationRecord:
    return EvaluationRecord(EditRequest(prompt, None, target), paraphrases, ())


RECORDS = [record("q1", "Tel Aviv", "r1", "r2"), record("q2", "1987"), record("q3", "東京", "r3")]
SAID = {
    "q1": "tel  aviv.", "r1": "She lives in Tel Aviv, Israel", "r2": "Haifa", "q2": "in 19871", "q3": "首都は東京です",
    "r3": "東京",
}  # fmt: skip


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def fake(model: Any, tok: Any, prompts: list[str], limit: int, chat: bool, progress: bool = False) -> list[Answer]:
        calls.append((prompts, limit, chat))
        return [Answer(SAID[prompt], (1,), True) for prompt in prompts]

    monkeypatch.setattr(real, "generate_answers", fake)
    return calls


def test_answers_are_matched_exactly_and_by_containment(scripted: list[Any]) -> None:
    found = real_answers(None, None, RECORDS, RealAnswers(7), chat=True)
    assert scripted == [(["q1", "r1", "r2", "q2", "q3", "r3"], 7, True)]
    assert found.exact.values == (1.0, 0.0, 0.0)
    assert found.contains.values == (1.0, 0.0, 1.0), "a part of a longer number is another one"
    assert found.rephrase_exact.values == (0.0, None, 1.0)
    assert found.rephrase_contains.values == (0.5, None, 1.0)
    assert found.judged is found.rephrase_judged is None


def test_the_judge_sees_question_target_and_answer(scripted: list[Any]) -> None:
    seen = []

    def judge(question: str, target: str, answer: str) -> bool:
        seen.append((question, target, answer))
        return "19871" in answer

    settings = with_judge(RealAnswers(), judge, "mine")
    found = real_answers(None, None, RECORDS, settings)
    assert ("q2", "1987", "in 19871") in seen
    assert len(seen) == 6
    assert found.judged.values == (0.0, 1.0, 0.0)
    assert settings.to_dict() == {"max_new_tokens": 64, "stops": ["\n"], "judge": "mine"}


@pytest.mark.parametrize(
    ("answer", "target", "same", "inside"),
    [
        ("Paris", "paris", True, True),
        ("“Paris”!", "Paris", True, True),
        ("Ｐａｒｉｓ", "Paris", True, True),
        ("It is Paris.", "Paris", False, True),
        ("Parisian", "Paris", False, False),
        ("New York City", "new  york", False, True),
        ("C++ it is", "C++", False, True),
        ("", "Paris", False, False),
        ("...", "?", True, False),
        ("她住在特拉维夫", "特拉维夫", False, True),
        ("in 1987", "198", False, False),
        ("a.b", "axb", False, False),
    ],
)
def test_matching(answer: str, target: str, same: bool, inside: bool) -> None:
    assert (plain(answer) == plain(target), contains(answer, target)) == (same, inside)


def test_an_answer_ends_at_the_first_stop() -> None:
    def said(text: str, *stops: str) -> str:
        return until_stop(Answer(text, (), False), stops)

    assert said("\n Rome \nParis", "\n") == "Rome"
    assert said("Rome. Paris; Lima", ";", ".") == "Rome"
    assert said("Rome") == "Rome"
    assert said("\n", "\n") == ""


@pytest.mark.parametrize("values", [{"max_new_tokens": 0}, {"stops": "\n"}, {"stops": ("",)}])
def test_settings_are_checked(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        RealAnswers(**values)


def test_the_answer_is_the_model_s_own_and_no_target_is_shown_to_it() -> None:
    """Its first tokens as targets are contained, and nothing else is."""
    model, tok = tiny_model(), tiny_tokenizer()
    prompt = "Danielle Darrieux speaks"
    with torch.no_grad():
        ids = tok(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    own = tok.decode(out, skip_special_tokens=True).strip()
    settings = RealAnswers(6, stops=())
    found = real_answers(model, tok, [record(prompt, own), record(prompt, "Ziqqurat")], settings)
    assert found.exact.values == (1.0, 0.0)
    assert found.rephrase_exact.count == 0
