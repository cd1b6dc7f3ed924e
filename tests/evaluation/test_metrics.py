from __future__ import annotations

from math import sqrt

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from easyedit_moe.errors import DataError
from easyedit_moe.evaluation import metrics
from easyedit_moe.evaluation.metrics import evaluate
from easyedit_moe.evaluation.scoring import TargetScore, score_targets
from easyedit_moe.evaluation.summary import Score
from easyedit_moe.facts.records import EvaluationRecord
from easyedit_moe.facts.requests import EditRequest

PAIRS = [
    ("Danielle Darrieux speaks", "French"),
    ("The twin city of Lyon is", "Manila and Rome"),
    ("Angola is in", "Africa"),
    ("東京 is the capital of", "Japan"),
]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
@pytest.mark.parametrize("specials", ["", "bos eos"])
def test_scores_equal_a_plain_computation(family: str, specials: str) -> None:
    model, tok = tiny_model(family), tiny_tokenizer(specials)
    for (prompt, target), score in zip(PAIRS, score_targets(model, tok, PAIRS, batch_size=3), strict=True):
        ids = tok(prompt)["input_ids"]
        ids = ids[:-1] if "eos" in specials else ids
        labels = tok(" " + target, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids + labels])).logits[0, len(ids) - 1 : -1].double()
        nll = -logits.log_softmax(-1)[range(len(labels)), labels].mean()
        assert score.nll == pytest.approx(float(nll), abs=1e-5)
        assert score.predicted == tuple(logits.argmax(-1).tolist())
        assert score.labels == tuple(labels)


def test_exact_means_that_greedy_generation_writes_the_target() -> None:
    model, tok = tiny_model(), tiny_tokenizer()
    prompt = tok(PAIRS[0][0], return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=3, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    score = TargetScore(0.0, tuple(written), tuple(written))
    assert score.exact
    assert score.token_accuracy == 1
    assert TargetScore(0.0, (1, 2, 3, 4), (1, 2, 3, 5)).token_accuracy == 0.75
    assert not TargetScore(0.0, (1, 2), (1, 3)).exact


def test_prompts_are_cut_from_the_left() -> None:
    model, tok = tiny_model(), tiny_tokenizer()
    cut = tok.decode(tok(PAIRS[0][0])["input_ids"][-2:])
    long = score_targets(model, tok, [(PAIRS[0][0], "French")], max_length=2)
    assert long[0].nll == pytest.approx(score_targets(model, tok, [(cut, "French")])[0].nll, abs=1e-6)


def test_score_of() -> None:
    score = Score.of([1.0, 0.0, 1.0, 1.0])
    assert score.mean == 75
    assert score.stderr == pytest.approx(100 * sqrt(0.25 / 4))
    assert Score.of([0.5]).stderr == 0
    assert Score.of([]).count == 0


def _records() -> list[EvaluationRecord]:
    return [
        EvaluationRecord(EditRequest("A is", "A", "new", "old"), ("p1", "p2"), (("n1", "old"), ("n2", "old"))),
        EvaluationRecord(EditRequest("B is", "B", "new", "old"), ("p3",), ()),
    ]


def _fake_scores(monkeypatch: pytest.MonkeyPatch, nlls: dict[tuple[str, str], float]) -> None:
    def fake(model: object, tok: object, pairs: list[tuple[str, str]], *_: object) -> list[TargetScore]:
        return [TargetScore(nlls[pair], (1, 2) if nlls[pair] < 1 else (1, 3), (1, 2)) for pair in pairs]

    monkeypatch.setattr(metrics, "score_targets", fake)


def test_counterfact_protocol_compares_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    nlls = {("A is", "new"): 0.5, ("A is", "old"): 2.0, ("B is", "new"): 3.0, ("B is", "old"): 2.0}
    nlls |= {("p1", "new"): 1.0, ("p1", "old"): 2.0, ("p2", "new"): 2.0, ("p2", "old"): 1.0}
    nlls |= {("p3", "new"): 1.0, ("p3", "old"): 2.0}
    nlls |= {("n1", "old"): 1.0, ("n1", "new"): 2.0, ("n2", "old"): 3.0, ("n2", "new"): 2.0}
    _fake_scores(monkeypatch, nlls)
    result = evaluate(None, None, _records())
    assert result.efficacy.mean == 50
    assert result.generalisation.mean == 75
    assert (result.specificity.mean, result.specificity.count) == (50, 1)
    assert result.utility.mean == pytest.approx(100 * ((1 + 0.5 + 0.5) / 3 + (0 + 1) / 2) / 2)
    assert result.exact_match.mean == 50


def test_zsre_protocol_counts_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    nlls = {("A is", "new"): 0.5, ("B is", "new"): 3.0, ("p1", "new"): 0.5, ("p2", "new"): 2.0, ("p3", "new"): 2.0}
    nlls |= {("n1", "old"): 0.5, ("n2", "old"): 0.5}
    _fake_scores(monkeypatch, nlls)
    result = evaluate(None, None, _records(), "zsre")
    assert result.efficacy.mean == 75
    assert result.generalisation.mean == 100 * (0.75 + 0.5) / 2
    assert result.specificity.mean == 100


def test_evaluate_refuses_nothing_and_unknown_protocols() -> None:
    with pytest.raises(DataError, match="no records"):
        evaluate(None, None, [])
    with pytest.raises(DataError, match="counterfact, zsre"):
        evaluate(None, None, _records(), "mcf")
