"""Every method in a chat: the edit is that of the text which the template makes of a prompt, and so are the scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from baselines import settings
from solving_editors import METHODS, hparams
from tiny import TEXTS, assert_same_state, chat_tokenizer, requests, state_of, tiny_model, tiny_tokenizer

from easyedit_moe.adapters.attachment import find_adapter
from easyedit_moe.editor import MoEEditor
from easyedit_moe.editors import make_editor
from easyedit_moe.errors import HyperParamsError, RequestError
from easyedit_moe.evaluation.metrics import evaluate
from easyedit_moe.evaluation.neighbours import answered
from easyedit_moe.evaluation.portability import portability
from easyedit_moe.evaluation.routing import routing_snapshot
from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.facts.records import EvaluationRecord
from easyedit_moe.facts.records.record import Probe, ProbeGroup
from easyedit_moe.facts.requests import parse_requests
from easyedit_moe.hparams import MEMoEHyperParams, MoEHyperParams
from easyedit_moe.workflow.edit import edit
from easyedit_moe.workflow.evaluate import evaluate as evaluate_workflow

# The answer begins on a line of its own, so the framed text is joined with the answer as the template does.
TOK = chat_tokenizer(template="<user>{{ messages[0]['content'] }}\n<assistant>\n{% for m in messages[1:] %}"
                     "{{ m['content'] }}{% endfor %}")  # fmt: skip
TRAINED = ("MoE-FT", "MoE-FT-L", "MoE-LoRA", "AdaLoRA", "UnKE")


pytestmark = pytest.mark.usefixtures("no_editing_warnings")


def framed(text: str) -> str:
    return f"<user>{text}\n<assistant>\n"


def in_text(facts: list[dict[str, str]]) -> list[dict[str, str]]:
    return [fact | {"prompt": framed(fact["prompt"])} for fact in facts]


def corpus(folder: Path) -> Path:
    (folder / "corpus.txt").write_text("\n".join(TEXTS * 4), encoding="utf-8")
    return folder


def hparams_of(method: str, folder: Path) -> MoEHyperParams:
    if method == "MEMoE":
        values = {"alg_name": "MEMoE", "model_name": "tiny", "layers": [2], "dtype": "float32", "steps": 6,
                  "locality_dataset": str(corpus(folder) / "corpus.txt"), "locality_n_samples": 8}  # fmt: skip
        return MEMoEHyperParams.from_dict(values)
    if method in TRAINED:
        return settings(method, **({"kl_factor": 0.0} if method == "UnKE" else {}))
    return hparams(corpus(folder), method, kl_factor=0.0)


def edited(method: str, folder: Path, facts: list[dict[str, str]], chat: bool) -> tuple[Any, list[float]]:
    """Everything that one edit changes, and the new answers' NLL in the chat."""
    model, hp = tiny_model(), hparams_of(method, folder)
    hp.chat = chat
    torch.manual_seed(0)
    make_editor(hp, progress=False).edit(model, TOK, parse_requests(facts))
    adapter = find_adapter(model)
    changed = state_of(model) if adapter is None else {n: p.detach() for n, p in adapter.named_parameters()}
    pairs = [(fact["prompt"], fact["target_new"]) for fact in facts]
    return changed, [score.nll for score in score_targets(model, TOK, pairs, chat=chat)]


@pytest.mark.parametrize("method", [*METHODS, *TRAINED, "MEMoE"])
def test_a_chat_is_the_text_that_the_template_makes(method: str, tmp_path: Path) -> None:
    facts = requests(1 if method == "MoE-ROME" else 3)
    in_chat, nll = edited(method, tmp_path, facts, chat=True)
    as_text, expected = edited(method, tmp_path, in_text(facts), chat=False)
    # The KL row of a target search is framed in a chat only, and is padded to another length.
    for first, second in zip(_tensors(in_chat), _tensors(as_text), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5 if method in (*METHODS, "UnKE") else 0)
    assert nll == pytest.approx(expected, abs=1e-5 if method in (*METHODS, "UnKE") else 0)
    before = score_targets(tiny_model(), TOK, [(fact["prompt"], fact["target_new"]) for fact in facts], chat=True)
    if method not in METHODS:  # solvers need more steps than these to get anywhere on a random model
        assert sum(nll) < sum(score.nll for score in before)
    other, _ = edited(method, tmp_path, facts, chat=False)
    far = [float((a - b).abs().max()) for a, b in zip(_tensors(in_chat), _tensors(other), strict=True)]
    assert max(far) > 1e-3


def _tensors(state: Any) -> list[torch.Tensor]:
    parameters = state.get("parameters", state)
    return list(parameters.values())


@pytest.mark.parametrize("method", ["Global", "MoE-FT", "MEMoE"])
def test_a_tokenizer_without_a_template_is_refused_before_anything_changes(method: str, tmp_path: Path) -> None:
    model, hp = tiny_model(), hparams_of(method, tmp_path)
    hp.chat = True
    before = state_of(model)
    with pytest.raises(RequestError, match="no chat template"):
        make_editor(hp, progress=False).edit(model, tiny_tokenizer(), parse_requests(requests(2)))
    assert find_adapter(model) is None
    assert_same_state(before, state_of(model))


def _probes(chat: bool) -> tuple[ProbeGroup, ...]:
    prompt = "The quick brown" if chat else framed("The quick brown")
    return (ProbeGroup("follows", (Probe(prompt, ("fox", "dog")),)),)


def test_every_score_is_in_the_chat() -> None:
    model = tiny_model()
    fact, other = requests(2)
    probe = {"prompt": "The twin city of Lyon is", "answer": "Rome"}

    def record(chat: bool) -> EvaluationRecord:
        frame = str if chat else framed
        (request,) = parse_requests([fact | {"prompt": frame(fact["prompt"]), "ground_truth": "French"}])
        return EvaluationRecord(
            request, (frame("We know: Danielle Darrieux speaks"),), ((frame(other["prompt"]), "Rome"),),
            unanswered=(frame(probe["prompt"]),),
        )  # fmt: skip

    assert evaluate(model, TOK, [record(True)], chat=True) == evaluate(model, TOK, [record(False)])
    chats, texts = ([replace(record(chat), portability=_probes(chat))] for chat in (True, False))
    assert portability(model, TOK, chats, chat=True) == portability(model, TOK, texts)
    assert portability(model, TOK, chats, chat=True).count == 1
    (chat,), (text,) = answered(model, TOK, [record(True)], chat=True), answered(model, TOK, [record(False)])
    assert [answer for _, answer in chat.neighbours] == [answer for _, answer in text.neighbours]
    routed = routing_snapshot(model, TOK, [fact["prompt"]], chat=True).picked
    expected = routing_snapshot(model, TOK, [framed(fact["prompt"])]).picked
    # Behind the question a template may end with a line break, which a plain prompt keeps as well.
    assert all(torch.equal(picked, expected[layer]) for layer, picked in routed.items())


def test_edit_and_evaluate_in_a_chat(tmp_path: Path) -> None:
    model = tiny_model()
    hp = hparams_of("MoE-FT", tmp_path)
    hp.chat = True
    report = edit(parse_requests(requests(2)), (model, TOK), hparams=hp, out=tmp_path / "out", progress=False)
    (before, after) = (report.facts[0].change.before, report.facts[0].change.after)
    assert after.probability > before.probability
    patch = report.patches[-1]
    assert patch.metadata["hparams"]["chat"] is True
    patch.revert(model)
    scores = score_targets(model, TOK, [(requests(1)[0]["prompt"], requests(1)[0]["target_new"])], chat=True)
    assert before.token_accuracy == scores[0].token_accuracy
    data = tmp_path / "facts.csv"
    lines = [",".join((fact["prompt"], fact["subject"], fact["target_new"])) for fact in requests(2)]
    data.write_text("\n".join(["prompt,subject,target_new", *lines]), encoding="utf-8")
    found = evaluate_workflow((model, TOK), data=data, progress=False, chat=True)
    assert found.provenance["chat"] is True
    assert "chat" not in evaluate_workflow((model, TOK), data=data, progress=False).provenance
    with pytest.raises(RequestError, match="no chat template"):
        evaluate_workflow((model, tiny_tokenizer()), data=data, progress=False, chat=True)


def test_easyedits_calls_score_in_the_chat(tmp_path: Path) -> None:
    model, hp = tiny_model(), hparams_of("MoE-FT", tmp_path)
    hp.chat = True
    fact = requests(1)[0]
    editor = MoEEditor(hp, model, TOK)
    metrics, _, _ = editor.edit(prompts=[fact["prompt"]], target_new=[fact["target_new"]], subject=[fact["subject"]])
    score = score_targets(model, TOK, [(fact["prompt"], fact["target_new"])], chat=True)[0]
    assert metrics[0]["pre"]["rewrite_acc"] == [score.token_accuracy]


def test_a_comparison_is_of_one_kind(tmp_path: Path) -> None:
    from easyedit_moe.comparison.compare import compare
    from easyedit_moe.comparison.task import Task

    hp = hparams_of("MoE-FT", tmp_path)
    request = parse_requests([requests(1)[0] | {"ground_truth": "French"}])[0]
    task = Task(tiny_model(), TOK, (EvaluationRecord(request, (), ()),), "counterfact", 1, {})
    hp.chat = True
    with pytest.raises(HyperParamsError, match="judged as plain text"):
        compare(task, [hp], progress=False)
    rows = compare(Task(task.model, TOK, task.records, "counterfact", 1, {}, chat=True), [hp], progress=False).rows
    assert [row.method for row in rows] == ["pre-edit", "MoE-FT"]
