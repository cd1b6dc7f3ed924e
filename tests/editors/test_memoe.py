from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXTS, assert_same_state, requests, state_of, tiny_model, tiny_tokenizer
from torch import Tensor, nn

import easyedit_moe
from easyedit_moe import MoEEditor, load_model
from easyedit_moe.adapters import training as adapter_training
from easyedit_moe.adapters.attachment import attach, detach, find_adapter
from easyedit_moe.adapters.moe_adapter import MoEAdapter, recorded_routing
from easyedit_moe.comparison.compare import compare
from easyedit_moe.comparison.task import Task
from easyedit_moe.editors import AdapterPatch, EditResult, MEMoEEditor, make_editor, memoe
from easyedit_moe.errors import (
    AdapterError,
    DataError,
    EditingWarning,
    HyperParamsError,
    LayerError,
    NumericalError,
    RequestError,
)
from easyedit_moe.evaluation.metrics import evaluate
from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.facts.records import load_records, parse_records
from easyedit_moe.facts.requests import parse_requests
from easyedit_moe.facts.tokens import encode_text
from easyedit_moe.hparams import MEMoEHyperParams, load_hyperparams

TOK = tiny_tokenizer()
UNTOUCHED = "The quick brown fox jumps over the lazy dog."


pytestmark = pytest.mark.usefixtures("no_editing_warnings")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memoe") / "corpus.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


def hparams(corpus: Path, **changes: Any) -> MEMoEHyperParams:
    values: dict[str, Any] = {
        "alg_name": "MEMoE", "model_name": "tiny", "layers": [1], "dtype": "float32", "expert_width": 16, "lr": 0.02,
        "steps": 6, "locality_weight": 0.3, "balance_weight": 0.01, "locality_batch_size": 4,
        "locality_max_tokens": 12, "locality_dataset": str(corpus),
    }  # fmt: skip
    return MEMoEHyperParams.from_dict(values | changes)


def edit(model: nn.Module, hp: MEMoEHyperParams, facts: Sequence[Any]) -> EditResult:
    return make_editor(hp, progress=False).edit(model, TOK, parse_requests(facts))


def nll(model: nn.Module, facts: Sequence[dict[str, str]]) -> list[float]:
    return [s.nll for s in score_targets(model, TOK, [(f["prompt"], f["target_new"]) for f in facts])]


@torch.no_grad()
def logits(model: nn.Module, text: str) -> Tensor:
    return model(input_ids=torch.tensor([encode_text(TOK, text)])).logits


# ---------------------------------------------------------------- edits


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_5_moe", "modulelist", "dense"])
@pytest.mark.parametrize("count", [1, 4])
def test_edits_raise_their_targets_and_leave_other_texts_alone(family: str, count: int, corpus: Path) -> None:
    model = tiny_model(family).train()
    model.lm_head.weight.requires_grad_(False)
    before, facts = state_of(model), requests(count)
    old, plain = nll(model, facts), logits(model.eval(), UNTOUCHED)
    model.train()
    result = edit(model, hparams(corpus), facts)
    assert all(new < was for new, was in zip(nll(model, facts), old, strict=True))
    assert sum(nll(model, facts)) < sum(old) - 0.2 * count
    assert torch.equal(logits(model.eval(), UNTOUCHED), plain)
    model.train()
    (report,) = result.solver_reports
    assert report.nll == pytest.approx(sum(nll(model, facts)) / count, abs=1e-4)
    assert len(report.load) == 4
    assert sum(report.load) == pytest.approx(1)
    assert 1 - 1e-3 <= report.balance <= 4
    assert (report.steps, report.replayed) == (6, 0)
    assert result.seconds["solve"] > 0
    result.patch.revert(model)
    assert_same_state(before, state_of(model))


def test_an_edit_is_seeded(corpus: Path) -> None:
    states = []
    for seed in (0, 0, 1):
        model = tiny_model()
        torch.manual_seed(seed + 17)
        edit(model, hparams(corpus, seed=seed), requests(2))
        states.append(find_adapter(model).state()["tensors"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["second"], states[2]["second"])


def test_the_locality_term_holds_the_model_back(corpus: Path) -> None:
    """Under "null" the adapter acts on every text, so the term shows on a text about nothing that was edited."""
    shifts = []
    for weight in (0.0, 20.0):
        model = tiny_model()
        plain = logits(model, TEXTS[6]).log_softmax(-1)
        edit(model, hparams(corpus, without_anchor="null", locality_weight=weight, steps=12), requests(2))
        shifts.append(float((plain.exp() * (plain - logits(model, TEXTS[6]).log_softmax(-1))).sum(-1).mean()))
    assert shifts[1] < shifts[0] / 2


def test_the_balance_term_evens_the_load(corpus: Path) -> None:
    balances = []
    for weight in (0.0, 5.0):
        model = tiny_model()
        hp = hparams(corpus, balance_weight=weight, locality_weight=0.0, steps=25, num_experts=4)
        balances.append(edit(model, hp, requests(6)).solver_reports[0].balance)
    assert balances[1] < balances[0]
    assert balances[1] < 1.5


def test_swapped_prompts_that_are_paraphrases_do_not_count(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, facts = tiny_model(), requests(4)
    edit(model, hparams(corpus), facts)
    adapter = find_adapter(model)
    job = adapter_training._Training(model, TOK, adapter, adapter.facts, [], hparams(corpus, locality_batch_size=40))
    monkeypatch.setattr(job, "_texts", lambda: [])
    rows, answers = job._swaps()
    assert len(rows) >= 10
    texts = {TOK.decode(row) for row in rows}
    assert "The twin city of Danielle Darrieux is" in texts
    assert not texts & {fact["prompt"] for fact in facts}
    own = [int(logits_off(model, fact["prompt"])[0, -1].argmax()) for fact in facts]
    assert set(answers) <= set(own)
    said = [int(logits_off(model, TOK.decode(row))[0, -1].argmax()) for row in rows]
    monkeypatch.setattr(job, "_swaps", lambda: (rows, said))
    assert float(job._locality().detach()) == 0
    monkeypatch.setattr(job, "_swaps", lambda: (rows, [-1] * len(rows)))
    assert float(job._locality().detach()) > 0


def logits_off(model: nn.Module, text: str) -> Tensor:
    adapter = find_adapter(model)
    adapter.enabled = False
    try:
        return logits(model, text)
    finally:
        adapter.enabled = True


def test_bfloat16_models(corpus: Path) -> None:
    model, facts = tiny_model(dtype=torch.bfloat16), requests(2)
    before, old = state_of(model), nll(model, facts)
    patch = edit(model, hparams(corpus), facts).patch
    assert find_adapter(model).second.dtype == torch.float32
    assert all(new < was for new, was in zip(nll(model, facts), old, strict=True))
    patch.revert(model)
    assert_same_state(before, state_of(model))


# ---------------------------------------------------------------- routing


def chosen(model: nn.Module, prompt: str) -> Tensor:
    """Which experts each token from the subject's end on is routed to, ``[N, E]`` bool."""
    with recorded_routing(find_adapter(model)) as seen:
        logits(model, prompt)
    return torch.cat([r.gates for r in seen]) > 0


PARAPHRASES = ["We all know that Danielle Darrieux is from", "In Rome, Danielle Darrieux", "danielle DARRIEUX was"]


def test_one_anchor_is_one_routing_by_construction(corpus: Path) -> None:
    """With ``token_weight`` 0 all tokens of all paraphrases share one choice, whatever was trained."""
    model = tiny_model()
    edit(model, hparams(corpus, token_weight=0.0, top_k=2, steps=15), requests(6))
    picked = torch.cat([chosen(model, p) for p in [requests(1)[0]["prompt"], *PARAPHRASES]])
    assert (picked == picked[0]).all()
    others = torch.stack([chosen(model, fact["prompt"])[0] for fact in requests(6)])
    assert (others != others[0]).any()


def test_a_new_gate_routes_by_the_anchor_alone() -> None:
    """With the paper's ``token_weight`` 1, too, because the token's half of W_g starts at zero."""
    model = tiny_model()
    config = MEMoEEditor(load_hyperparams("MEMoE/factworld"))._config(model)
    values = {**vars(config), "d_model": 32, "layer": 1, "token_weight": 1.0, "top_k": 1}
    adapter = attach(model, TOK, MoEAdapter(type(config)(**values)).eval())
    easyedit_moe.adapters.attachment.add_subjects(model, TOK, adapter, ["Danielle Darrieux"])
    picked = torch.cat([chosen(model, p) for p in [requests(1)[0]["prompt"], *PARAPHRASES]])
    assert (picked == picked[0]).all()


# ---------------------------------------------------------------- batches that follow each other


def test_later_batches_go_on_with_the_same_adapter(corpus: Path) -> None:
    model, facts = tiny_model(), requests(4)
    before = state_of(model)
    first = edit(model, hparams(corpus), facts[:2])
    adapter, between = find_adapter(model), [logits(model, f["prompt"]) for f in facts]
    second = edit(model, hparams(corpus), facts[2:])
    assert find_adapter(model) is adapter
    assert [f.subject for f in adapter.facts] == [f["subject"] for f in facts]
    assert second.solver_reports[0].replayed == 2
    assert adapter.anchors.shape == (4, 32)
    with pytest.raises(AdapterError, match="has learnt 1 more batches since"):
        first.patch.revert(model)
    second.patch.revert(model)
    assert all(torch.equal(logits(model, f["prompt"]), b) for f, b in zip(facts, between, strict=True))
    assert [f.subject for f in adapter.facts] == [f["subject"] for f in facts[:2]]
    with pytest.raises(AdapterError, match="nothing to revert"):
        second.patch.revert(model)
    first.patch.revert(model)
    assert_same_state(before, state_of(model))


def test_replay_keeps_earlier_edits(corpus: Path) -> None:
    facts, kept = requests(6), {}
    for replay in (True, False):
        model = tiny_model()
        hp = hparams(corpus, replay=replay, steps=10, lr=0.05, locality_weight=0.0, num_experts=1)
        edit(model, hp, facts[:3])
        result = edit(model, hp, facts[3:])
        assert result.solver_reports[0].replayed == (3 if replay else 0)
        kept[replay] = sum(nll(model, facts[:3]))
    assert kept[True] < kept[False]


def people(start: int, stop: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"Ana {chr(65 + n)}ro lives in", "subject": f"Ana {chr(65 + n)}ro", "target_new": "Rome"}
        for n in range(start, stop)
    ]


def test_a_batch_costs_the_same_however_many_there_were(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Facts that are encoded, tokens that pass the model, and what is kept, saved and needed to undo."""
    model, encoded, passed, costs = tiny_model(), [], [], []
    right = adapter_training.encode_pair
    monkeypatch.setattr(adapter_training, "encode_pair", lambda *rest: (encoded.append(1), right(*rest))[1])

    def counted(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        passed.append(len(kwargs["input_ids"]))

    handle = model.register_forward_pre_hook(counted, with_kwargs=True)
    hp = hparams(corpus, steps=3, train_batch_size=4, replay_facts=3, max_facts=6)
    for number in range(8):
        encoded.clear()
        passed.clear()
        with warnings.catch_warnings(record=True):
            result = edit(model, hp, people(2 * number, 2 * number + 2))
        adapter = find_adapter(model)
        result.patch.save(tmp_path / f"{number}.safetensors")
        before = result.patch.before["tensors"].values() if result.patch.before else ()
        size = (tmp_path / f"{number}.safetensors").stat().st_size
        costs.append((len(encoded), sum(passed), len(adapter.facts), len(adapter.subjects), len(adapter.anchors),
                      result.solver_reports[0].replayed, sum(t.nbytes for t in before), size))  # fmt: skip
    handle.remove()
    assert len(set(costs[4:])) == 1, costs
    assert costs[-1][2:6] == (6, 6, 6, 3)
    assert costs[-1][0] == 5
    assert costs[0] != costs[1] != costs[2]


def test_the_oldest_facts_leave_and_are_as_if_never_edited(corpus: Path) -> None:
    model = tiny_model()
    facts, plain = people(0, 4), logits(model, "Ana Aro lives in")
    hp = hparams(corpus, max_facts=3)
    edit(model, hp, facts[:2])
    assert not torch.equal(plain, logits(model, "Ana Aro lives in"))
    again = {**facts[1], "prompt": "Ana Bro was born in"}
    with pytest.warns(EditingWarning, match="keeps 3 facts .max_facts., so the 1 oldest leave"):
        result = edit(model, hp, [facts[2], again])
    adapter = find_adapter(model)
    assert adapter.subjects == ("Ana Bro", "Ana Cro")
    assert [fact.prompt for fact in adapter.facts] == [facts[1]["prompt"], facts[2]["prompt"], again["prompt"]]
    assert torch.equal(plain, logits(model, "Ana Aro lives in"))
    # A fact leaves, but its subject has another one.
    with pytest.warns(EditingWarning, match="the 1 oldest"):
        edit(model, hp, [facts[3]])
    assert adapter.subjects == ("Ana Bro", "Ana Cro", "Ana Dro")
    result.patch.restore(model)
    assert find_adapter(model).subjects == ("Ana Aro", "Ana Bro")
    with pytest.raises(HyperParamsError, match="max_facts is 3, but one batch has 4 facts"):
        edit(model, hp, facts)
    assert find_adapter(model).subjects == ("Ana Aro", "Ana Bro")


def test_replayed_facts_are_drawn_from_all(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_model(), []
    right = memoe.train_adapter

    def watched(*rest: Any) -> Any:
        seen.append([fact.subject for fact in rest[4]])
        return right(*rest)

    monkeypatch.setattr(memoe, "train_adapter", watched)
    hp = hparams(corpus, steps=1, replay_facts=4)
    edit(model, hp, people(0, 12))
    for number in range(12, 18):
        edit(model, hp, people(number, number + 1))
    drawn = {subject for some in seen[1:] for subject in some}
    assert [len(some) for some in seen] == [0] + 6 * [4]
    assert len(drawn) > 8


def test_a_later_edit_of_the_same_prompt_wins(corpus: Path) -> None:
    model, fact = tiny_model(), requests(1)[0]
    edit(model, hparams(corpus), [fact])
    result = edit(model, hparams(corpus, steps=12, locality_weight=0.0), [fact | {"target_new": "Rome"}])
    assert [f.target_new for f in find_adapter(model).facts] == ["Rome"]
    assert result.solver_reports[0].replayed == 0
    assert nll(model, [fact | {"target_new": "Rome"}]) < nll(model, [fact])


def test_a_loaded_adapter_can_be_trained_further(corpus: Path, tmp_path: Path) -> None:
    model, facts = tiny_model(), requests(4)
    edit(model, hparams(corpus), facts[:2]).patch.save(tmp_path / "adapter")
    other = tiny_model()
    attach(other, TOK, MoEAdapter.load(tmp_path / "adapter"))
    assert edit(other, hparams(corpus), facts[2:]).solver_reports[0].replayed == 2
    edit(model, hparams(corpus), facts[2:])
    assert torch.equal(logits(other, facts[3]["prompt"]), logits(model, facts[3]["prompt"]))


def test_an_adapter_of_other_settings_is_not_trained_further(corpus: Path) -> None:
    model = tiny_model()
    edit(model, hparams(corpus), requests(1))
    before = state_of(model)
    with pytest.raises(HyperParamsError, match=r"other settings \(layer: 1, not 2; top_k: 1, not 2\)"):
        edit(model, hparams(corpus, layers=[2], top_k=2), requests(2)[1:])
    assert_same_state(before, state_of(model))


# ---------------------------------------------------------------- failure leaves nothing behind


class Trouble(Exception):
    pass


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
@pytest.mark.parametrize("earlier", [0, 2])
def test_an_error_half_way(
    error: type[BaseException], earlier: int, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, facts, calls = tiny_model("gpt_oss").train(), requests(4), []
    if earlier:
        edit(model, hparams(corpus), facts[:earlier])
    before, adapter = state_of(model), find_adapter(model)
    held = adapter.state() if adapter else None
    plain = adapter_training._Training.loss

    def third_fails(self: Any) -> Any:
        calls.append(bool(find_adapter(model).second.any()))
        if len(calls) == 3:
            raise error
        return plain(self)

    monkeypatch.setattr(adapter_training._Training, "loss", third_fails)
    with pytest.raises(error):
        edit(model, hparams(corpus), facts[earlier:])
    assert calls[-1], "training had begun"
    assert find_adapter(model) is adapter
    assert_same_state(before, state_of(model))
    if earlier:
        assert (adapter.facts, adapter.subjects, adapter.edits) == (held["facts"], held["subjects"], 1)


def test_weights_that_are_not_finite(corpus: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("inf")
    before = state_of(model)
    with pytest.raises(NumericalError, match="not finite"):
        edit(model, hparams(corpus), requests(2))
    assert_same_state(before, state_of(model))


def test_bad_requests_and_settings_change_nothing(corpus: Path) -> None:
    model, hybrid = tiny_model(), tiny_model("nemotron_h")
    before, beside = state_of(model), state_of(hybrid)
    fact = requests(1)[0]
    without = {name: value for name, value in fact.items() if name != "subject"}
    inside = fact | {"prompt": "Anabel speaks", "subject": "Ana"}
    for facts, message in (
        ([without], "subject"),
        ([inside], "does not occur in the prompt .Anabel speaks. as whole words"),
        ([], "empty"),
    ):
        with pytest.raises(RequestError, match=message):
            edit(model, hparams(corpus), facts)
    covered = fact | {"prompt": "Ana met Danielle Darrieux, who speaks", "subject": "Ana"}
    with pytest.raises(RequestError, match="but 'Danielle Darrieux' is found"):
        edit(model, hparams(corpus), [covered, fact])
    with pytest.raises(LayerError, match="out of range"):
        edit(model, hparams(corpus, layers=[7]), requests(1))
    with pytest.raises(DataError, match="does not exist"):
        edit(model, hparams(corpus, locality_dataset="nowhere.txt"), requests(1))
    assert_same_state(before, state_of(model))
    with pytest.raises(LayerError, match="has no FFN"):
        edit(hybrid, hparams(corpus, layers=[0]), requests(1))
    assert_same_state(beside, state_of(hybrid))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, r"top_k must be in 1\.\.4, the experts; found 5"), ({"layers": [1, 2]}, "exactly one layer"),
        ({"without_anchor": "maybe"}, "one of skip, null"), ({"use_anchors": False}, "null where use_anchors is false"),
        ({"lr": 0.0}, "lr must be greater than 0"), ({"adapter_scale": 0}, "greater than 0"),
        ({"num_experts": 0}, "num_experts must be at least 1"), ({"noise": -0.1}, "noise must be at least 0"),
    ],
)  # fmt: skip
def test_settings_out_of_range(changes: dict[str, Any], message: str, corpus: Path) -> None:
    with pytest.raises(HyperParamsError, match=message):
        hparams(corpus, **changes)


# ---------------------------------------------------------------- interfaces


def test_apply_to_model_as_easyedit_calls_it(corpus: Path) -> None:
    model, facts = tiny_model(), requests(1)
    before = state_of(model)
    apply = easyedit_moe.apply_memoe_to_model
    returned, weights = apply(model, TOK, facts, hparams(corpus), return_orig_weights=True, train_ds=None)
    assert returned is model
    assert find_adapter(model) is not None
    assert dict(weights.items()) == {}
    weights()
    assert_same_state(before, state_of(model))
    weights()  # a second time does nothing
    edited, weights = apply(model, TOK, facts, hparams(corpus), copy=True, keep_original_weight=True)
    assert_same_state(before, state_of(model))
    assert find_adapter(edited) is not None
    weights()
    assert find_adapter(edited) is None
    assert apply(model, TOK, facts, hparams(corpus), copy=True)[1] == {}


def test_easyedits_loop_over_original_weights_restores(corpus: Path) -> None:
    """Its editors copy each item of ``weights_copy`` into the model; there are none, so asking for them is the cue."""
    model, facts = tiny_model(), requests(3)
    before = state_of(model)
    apply = easyedit_moe.apply_memoe_to_model
    for fact in facts:
        model, weights = apply(model, TOK, [fact], hparams(corpus), return_orig_weights=True)
        assert find_adapter(model) is not None
        assert (len(weights), list(weights), dict(weights), weights == {}) == (0, [], {}, True)
        assert find_adapter(model) is not None  # to look at it is not to restore
        with torch.no_grad():
            for name, value in weights.items():
                model.get_parameter(name)[...] = value
        assert_same_state(before, state_of(model))
    _, first = apply(model, TOK, facts[:1], hparams(corpus), return_orig_weights=True)
    middle = {name: tensor.clone() for name, tensor in find_adapter(model).named_parameters()}
    _, second = apply(model, TOK, facts[1:2], hparams(corpus), return_orig_weights=True)
    assert list(second.items()) == []
    now = dict(find_adapter(model).named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in middle.items())
    assert list(first.items()) == list(first.items()) == []
    assert_same_state(before, state_of(model))


def test_patches_of_adapters_have_ids_and_provenance(corpus: Path) -> None:
    model = tiny_model()
    editor = MoEEditor(hparams(corpus), model, TOK)
    editor.edit_requests(requests(2), sequential_edit=True, verbose=False)
    first, second = editor.patches
    assert (first.parent, second.parent) == (None, first.id)
    assert first.id != second.id
    assert second.metadata["requests"][0]["prompt"] == requests(2)[1]["prompt"]
    assert second.warnings == second.metadata["warnings"]


def test_stand_alone_editor(corpus: Path) -> None:
    model = tiny_model()
    before, facts = state_of(model), requests(3)
    editor = MoEEditor(hparams(corpus, batch_size=2), model, TOK)
    editor.edit_requests(facts, verbose=False)
    assert_same_state(before, state_of(model))
    columns = {"prompts": "prompt", "target_new": "target_new", "subject": "subject"}
    given = {name: [f[key] for f in facts] for name, key in columns.items()}
    metrics, _, weights = editor.batch_edit(**given, sequential_edit=True, verbose=False)
    assert len(metrics) == 3
    assert dict(weights) == {}
    assert len(find_adapter(model).facts) == 3
    editor.undo()
    assert len(find_adapter(model).facts) == 2
    editor.undo()
    assert_same_state(before, state_of(model))


def test_compare_scores_the_adapter_and_restores_the_model(corpus: Path) -> None:
    records = [
        {
            "prompt": f["prompt"], "subject": f["subject"], "target_new": f["target_new"],
            "ground_truth": f["ground_truth"], "rephrase_prompt": f"We know that {f['prompt']}",
            "locality_prompt": "Anabel met", "locality_ground_truth": "Paris",
        }
        for f in requests(4)
    ]  # fmt: skip
    found = parse_records(records)
    provenance = {"model": "tiny", "edits": 4, "batch_size": 2, "protocol": "counterfact"}
    task = Task(tiny_model(), TOK, found.records, found.protocol, 2, provenance)
    before, hp = state_of(task.model), hparams(corpus, steps=12, lr=0.05, locality_weight=0.1)
    row = compare(task, [hp]).rows[1]
    assert_same_state(before, state_of(task.model))
    assert (row.method, row.edits, row.rounding_loss, row.targets_reached) == ("MEMoE", "adapter", None, None)
    assert row.seconds["solve"] > 0
    assert row.routing["edit"]["mean"] < 100
    assert row.routing["preservation"]["mean"] == 100
    editor = make_editor(hp, progress=False)
    for start in (0, 2):
        editor.edit(task.model, TOK, [r.request for r in found.records[start : start + 2]])
    assert evaluate(task.model, TOK, found.records, found.protocol) == row.scores
    assert row.scores.efficacy.mean == 100
    detach(task.model)


def test_patches_restore_in_any_state(corpus: Path) -> None:
    model = tiny_model()
    before = state_of(model)
    patches = [edit(model, hparams(corpus), [fact]).patch for fact in requests(3)]
    assert all(isinstance(patch, AdapterPatch) for patch in patches)
    for patch in reversed(patches):
        patch.restore(model)
        patch.restore(model)
    assert_same_state(before, state_of(model))
    patch = edit(model, hparams(corpus), requests(1)).patch
    detach(model)
    patch.restore(model)
    assert_same_state(before, state_of(model))


# ---------------------------------------------------------------- the bundled model


@pytest.fixture(scope="module")
def bundled() -> Any:
    """The bundled model with ten edits, trained for a few seconds only."""
    model, tok = load_model("factworld", "float32")
    records = load_records("factworld").records[200:210]
    before = evaluate(model, tok, records)
    hp = load_hyperparams("MEMoE/factworld", steps=35, locality_batch_size=4)
    make_editor(hp, progress=False).edit(model, tok, [r.request for r in records])
    return model, tok, records, before


def test_ten_edits_of_the_bundled_model(bundled: Any) -> None:
    model, tok, records, before = bundled
    after = evaluate(model, tok, records)
    assert before.efficacy.mean == 0
    assert after.efficacy.mean >= 90
    assert after.specificity.mean >= 95


def test_paraphrases_of_one_fact_are_routed_alike(bundled: Any) -> None:
    """The last tokens of a fact's seven phrasings, after training."""
    model, tok, records, _ = bundled
    adapter, used = find_adapter(model), set()
    for record in records:
        experts = []
        for prompt in (record.request.prompt, *record.paraphrases):
            with recorded_routing(adapter) as seen, torch.no_grad():
                model(input_ids=torch.tensor([encode_text(tok, prompt)]))
            experts.append(tuple((seen[0].gates[-1] > 0).tolist()))
        assert len(set(experts)) == 1, record.request.subject
        used.add(experts[0])
    assert len(used) > 1
