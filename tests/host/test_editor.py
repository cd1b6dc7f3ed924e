"""Our methods in EasyEdit's BaseEditor. Everything here needs a checkout of EasyEdit."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from solving_editors import VARIANTS, down_projections, hparams
from tiny import TEXTS, assert_same_state, requests, state_of, tiny_model, tiny_tokenizer
from torch import nn

from easyedit_moe import factworld
from easyedit_moe.editor import MoEEditor
from easyedit_moe.errors import (
    HostError,
    HyperParamsError,
    KeywordError,
    RequestError,
    RidgeTooLargeWarning,
)
from easyedit_moe.facts.records import load_records
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.hparams import MoEHyperParams, MoTEHyperParams

FAMILIES = ("qwen3_moe", "gpt_oss", "qwen3_5_moe", "mixtral")
FACTS = requests(4)
PROMPTS, SUBJECTS, TARGETS, TRUTHS = (
    [f[name] for f in FACTS] for name in ("prompt", "subject", "target_new", "ground_truth")
)
LISTS = {"prompts": PROMPTS, "target_new": TARGETS, "ground_truth": TRUTHS, "subject": SUBJECTS}


def everything() -> dict[str, Any]:
    """All that EasyEdit scores; it changes such dicts, so each call gets its own."""
    locality = {
        "neighborhood": {
            "prompt": ["Kenya is in", None, "Zwolle lies in", "Rome is in"],
            "ground_truth": ["Africa", None, "Leiden", "Japan"],
        },
        "many": {"prompt": [["The fox", "The dog"]] * 4, "ground_truth": [["jumps", "is lazy"]] * 4},
    }  # fmt: skip
    portability = {"reasoning": {"prompt": [f"So, {p}" for p in PROMPTS], "ground_truth": TARGETS}}
    return {
        **LISTS,
        "rephrase_prompts": [f"We know that {p}" for p in PROMPTS],
        "locality_inputs": locality,
        "portability_inputs": portability,
        "verbose": False,
    }


def request_dicts() -> list[dict[str, Any]]:
    """The same as :func:`everything`, as EasyEdit's request dicts."""
    given = everything()
    return [
        fact
        | {"rephrase_prompt": given["rephrase_prompts"][i]}
        | {
            section: {
                key: {name: value[name][i] for name in ("prompt", "ground_truth")}
                for key, value in given[f"{section}_inputs"].items()
                if value["prompt"][i] is not None
            }
            for section in ("locality", "portability")
        }
        for i, fact in enumerate(FACTS)
    ]


pytestmark = pytest.mark.usefixtures("own_folder", "no_editing_warnings")


class Pair:
    """One editor in EasyEdit and one stand-alone, of the same hparams on equal models."""

    def __init__(self, host: ModuleType, hp: MoEHyperParams, model: Callable[[], nn.Module], tok: Any) -> None:
        own = type(hp).from_dict(asdict(hp))
        hp.model_name = (model(), tok)
        self.host = host.BaseEditor.from_hparams(hp)
        self.own = MoEEditor.from_hparams(own, model(), tok)


@pytest.fixture
def pair(host: ModuleType, data: Path) -> Callable[..., Pair]:
    def build(variant: str = "Global", family: str = "qwen3_moe", tok: Any = None, **changes: Any) -> Pair:
        strong = {"v_num_grad_steps": 3, "v_lr": 0.5, "clamp_norm_factor": 20, "lambda_reg": 1e-3}
        layers = {"layers": [2]} if variant == "MoE-ROME" else {}
        hp = hparams(data, variant, **(strong | layers | changes))
        return Pair(host, hp, lambda: tiny_model(family), tok or tiny_tokenizer())

    return build


def scores(entry: dict[str, Any]) -> dict[str, Any]:
    """All accuracies of one request, by phase and place."""
    found = {}
    for phase in ("pre", "post"):
        for name, value in entry[phase].items():
            if name.endswith("_acc"):
                found[phase, name] = value
        for section in ("locality", "portability"):
            for name, value in entry[phase][section].items():
                if name.endswith("_acc"):
                    found[phase, section, name] = value
    return found


def assert_same_scores(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> None:
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        assert scores(a).keys() == scores(b).keys()
        for place, values in scores(a).items():
            assert values == pytest.approx(scores(b)[place]), place


def changed(before: dict[str, Any], model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if not torch.equal(p, before["parameters"][n])}


# ---------------------------------------------------------------- results and restoring


CALLS = [(call, family) for family in FAMILIES for call in ("edit", "batch_edit")] + [("edit_requests", "qwen3_moe")]


@pytest.mark.parametrize(("call", "family"), CALLS)
def test_metrics_are_complete_and_the_weights_come_back(call: str, family: str, pair: Any) -> None:
    both = pair(family=family, batch_size=3)
    before, tok = state_of(both.host.model), both.host.tok
    settings = (tok.padding_side, tok.pad_token)
    if call == "edit_requests":
        metrics, model, weights = both.host.edit_requests(request_dicts(), verbose=False)
    else:
        metrics, model, weights = getattr(both.host, call)(**everything())
    assert model is both.host.model
    assert_same_state(before, state_of(model))
    assert set(weights) == down_projections(model, [1, 2])
    assert all(torch.equal(w, before["parameters"][n]) for n, w in weights.items())
    assert (tok.padding_side, tok.pad_token) == settings
    for i, entry in enumerate(metrics):
        near = set() if i == 1 else {("post", "locality", "neighborhood_acc")}
        assert set(scores(entry)) == near | {("post", "locality", "many_acc")} | {
            (phase, *name)
            for phase in ("pre", "post")
            for name in (("rewrite_acc",), ("rephrase_acc",), ("portability", "reasoning_acc"))
        }
        assert len(entry["post"]["locality"]["many_acc"]) == 2
        assert entry["requested_rewrite"]["subject"] == SUBJECTS[i]
    ours, _, _ = both.own.batch_edit(**everything()) if call == "batch_edit" else both.own.edit(**everything())
    assert_same_scores(metrics, ours)
    moved = [value for entry in metrics for value in entry["post"]["locality"]["many_acc"]]
    assert min(moved) < 1  # the edits do show in the host's numbers


@pytest.mark.parametrize("family", FAMILIES)
def test_sequential_edits_accumulate_to_the_weights_of_stand_alone_editing(family: str, pair: Any) -> None:
    both = pair(family=family, remember_edits=True)
    before = state_of(both.host.model)
    metrics, model, _ = both.host.edit(**everything(), sequential_edit=True)
    ours, own, _ = both.own.edit(**everything(), sequential_edit=True)
    assert changed(before, model) == down_projections(model, [1, 2])
    assert_same_state(state_of(own), state_of(model))
    assert_same_scores(metrics, ours)
    assert len(both.host.memory.keys[1]) == 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_gives_bit_equal_weights_in_both_homes(variant: str, pair: Any) -> None:
    both = pair(variant, batch_size=2)
    before = state_of(both.host.model)
    for call, chosen in (("edit", slice(1)), ("batch_edit", slice(1, None))):
        lists = {name: values[chosen] for name, values in LISTS.items()}
        theirs, ours = (getattr(e, call)(**lists, sequential_edit=True, verbose=False) for e in (both.host, both.own))
        assert_same_state(state_of(both.own.model), state_of(both.host.model))
        assert_same_scores(theirs[0], ours[0])
        assert theirs[2].keys() == ours[2].keys()
        assert all(torch.equal(theirs[2][name], ours[2][name]) for name in ours[2])
    hp = both.host.hparams
    written = hp.layers[-1:] if getattr(hp, "spread", "") == "last" else hp.layers
    assert changed(before, both.host.model) == down_projections(both.host.model, written)
    trial = state_of(both.host.model)
    both.host.edit(PROMPTS[0], TRUTHS[0], subject=SUBJECTS[0], verbose=False)
    assert_same_state(trial, state_of(both.host.model))


@pytest.mark.parametrize("sequential", [False, True])
def test_normal_edit(sequential: bool, pair: Any) -> None:
    both = pair(batch_size=1)
    before = state_of(both.host.model)
    metrics, model, weights = both.host.normal_edit(PROMPTS, TARGETS, sequential_edit=sequential, subject=SUBJECTS)
    assert metrics is None
    assert model is both.host.model
    assert all(torch.equal(w, before["parameters"][n]) for n, w in weights.items())
    if sequential:
        both.own.hparams.batch_size = 4  # EasyEdit's normal_edit takes all requests at once
        both.own.batch_edit(**LISTS, sequential_edit=True)
        assert_same_state(state_of(both.own.model), state_of(model))
    else:
        assert_same_state(before, state_of(model))


@pytest.mark.parametrize("call", ["edit", "batch_edit", "normal_edit"])
def test_an_edit_that_does_nothing_says_so(call: str, pair: Any) -> None:
    """... in both homes alike, once for each batch; EasyEdit's own ``apply_algo`` too."""
    both = pair(metric="identity", lambda_reg=1e6, batch_size=4)
    options = {} if call == "normal_edit" else {"verbose": False}
    told = []
    for editor in (both.host, both.own):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            getattr(editor, call)(prompts=PROMPTS, target_new=TARGETS, subject=SUBJECTS, **options)
        told.append([str(w.message) for w in caught if issubclass(w.category, RidgeTooLargeWarning)])
    assert told[0] == told[1]
    assert len(told[0]) == (len(PROMPTS) if call == "edit" else 1)
    with pytest.warns(RidgeTooLargeWarning):
        both.host.apply_algo(both.host.model, both.host.tok, requests(2), both.host.hparams)


def test_generate_edit(pair: Any) -> None:
    tok = tiny_tokenizer(pad=False)
    tok.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    both = pair(tok=tok, batch_size=7)
    editor, before = both.host, state_of(both.host.model)
    generate = editor.model.generate
    editor.model.generate = lambda *args, **kwargs: generate(*args, **{**kwargs, "max_new_tokens": 3})
    asked = {"prompt": [["Angola"]] * 4, "ground_truth": [["Russia"]] * 4}
    given = {"rephrase_prompts": PROMPTS, "portability_inputs": {"por_hop": asked}, "verbose": False}
    with pytest.raises(RequestError, match="Request 3: 'target_new' is empty"):
        editor.generate_edit(**(LISTS | {"target_new": [*TARGETS[:3], " "]}), **given, sequential_edit=True)
    results, _, _ = editor.generate_edit(**LISTS, **given)
    assert_same_state(before, state_of(editor.model))
    assert [entry["requested_rewrite"]["subject"] for entry in results] == SUBJECTS
    assert all(entry["post"].keys() >= {"rewrite_ans", "rephrase_ans", "portability_ans"} for entry in results)
    editor.generate_edit(**LISTS, **given, sequential_edit=True)
    both.own.edit(**LISTS, sequential_edit=True)
    assert not changed(state_of(both.own.model), editor.model)
    assert (editor.hparams.batch_size, tok.pad_token) == (7, None)


def test_a_trial_between_sequential_edits_leaves_no_trace(pair: Any) -> None:
    one, other = pair("MoE-AlphaEdit"), pair("MoE-AlphaEdit")
    for i, editor in ((0, one.host), (0, other.host), (1, one.host), (2, one.host), (2, other.host)):
        editor.edit(PROMPTS[i], TARGETS[i], subject=SUBJECTS[i], sequential_edit=i != 1, verbose=False)
    assert_same_state(state_of(other.host.model), state_of(one.host.model))
    one.host.forget_edits()
    assert one.host.memory is None


@pytest.mark.parametrize("kind", [str, tuple])
def test_texts_and_tuples_are_as_good_as_lists(kind: type, pair: Any) -> None:
    both = pair()

    def shaped(values: list[str]) -> Any:
        return values[0] if kind is str else tuple(values[:2])

    lists = {name: shaped(values) for name, values in LISTS.items()}
    more = {"rephrase_prompts": shaped([f"So {p}" for p in PROMPTS]), "target_neg": shaped(TRUTHS)}
    more["locality_inputs"] = {"near": {"prompt": shaped(PROMPTS[::-1]), "ground_truth": shaped(TRUTHS[::-1])}}
    plain = {name: values[: 1 if kind is str else 2] for name, values in LISTS.items()}
    for call in ("edit", "batch_edit"):
        metrics, _, _ = getattr(both.host, call)(**lists, **json.loads(json.dumps(more)), verbose=False)
        again, _, _ = getattr(both.host, call)(**plain, verbose=False)
        assert [m["post"]["rewrite_acc"] for m in metrics] == [m["post"]["rewrite_acc"] for m in again]
        assert metrics[0]["requested_rewrite"]["target_neg"] == TRUTHS[0]
        assert len(metrics[0]["post"]["locality"]["near_acc"]) == 1
    given = {"near": {"prompt": "Kenya is in", "ground_truth": "Africa"}}
    both.host.edit(PROMPTS[0], TARGETS[0], subject=SUBJECTS[0], locality_inputs=given, verbose=False)
    assert given == {"near": {"prompt": "Kenya is in", "ground_truth": "Africa"}}


def test_requests_may_be_rome_s_dicts_or_edit_requests(pair: Any) -> None:
    both = pair()
    rome = [
        {
            "requested_rewrite": {
                "prompt": f["prompt"].replace(f["subject"], "{}"), "subject": f["subject"],
                "target_new": {"str": f["target_new"]}, "target_true": {"str": f["ground_truth"]},
            }
        }
        for f in FACTS[:2]
    ]  # fmt: skip
    weights = []
    for given in (FACTS[:2], rome, [EditRequest(**f) for f in FACTS[:2]]):
        metrics, model, _ = both.host.edit_requests(given, sequential_edit=True, verbose=False)
        assert [m["requested_rewrite"]["prompt"] for m in metrics] == PROMPTS[:2]
        assert metrics[0]["requested_rewrite"]["ground_truth"] == TRUTHS[0]
        weights.append(state_of(model))
        both = pair()
    assert_same_state(weights[0], weights[1])
    assert_same_state(weights[0], weights[2])
    metrics, _, _ = both.host.edit([], [], requests=request_dicts()[:1], verbose=False)
    assert metrics[0]["post"]["portability"].keys() == {"reasoning_acc"}


@pytest.mark.parametrize(("side", "pad"), [("left", True), ("right", False)])
def test_the_tokenizer_s_padding_changes_nothing(side: str, pad: bool, pair: Any) -> None:
    both, tok = pair(), tiny_tokenizer(padding_side=side, pad=pad)
    other = pair(tok=tok)
    theirs, model, _ = other.host.edit(**everything(), sequential_edit=True)
    ours, own, _ = both.own.edit(**everything(), sequential_edit=True)
    assert_same_state(state_of(own), state_of(model))
    assert_same_scores(theirs, ours)
    assert tok.padding_side == side
    assert (tok.pad_token is not None) == pad


# ---------------------------------------------------------------- loading by name


def test_the_bundled_model_as_the_readme_has_it(host: ModuleType, tmp_path: Path) -> None:
    given = MoTEHyperParams.from_hparams(
        "hparams/MoTE/factworld.yaml", layers=[1, 2], mom2_n_samples=40, v_num_grad_steps=4, context_prefixes=[]
    )
    editor = host.BaseEditor.from_hparams(given)
    assert editor.hparams.model_name == given.model_name == factworld.MODEL_NAME
    assert next(editor.model.parameters()).dtype is torch.float32
    record = load_records("factworld").records[0]
    fact, before = record.request, state_of(editor.model)
    known = {"truth": {"prompt": [fact.prompt], "ground_truth": [fact.ground_truth]}}
    call = {"prompts": [fact.prompt], "target_new": [fact.target_new], "subject": [fact.subject]}
    call |= {"portability_inputs": known}
    metrics, _, _ = editor.edit(**call, verbose=False)
    assert metrics[0]["pre"]["portability"]["truth_acc"] == [1]
    assert metrics[0]["pre"]["rewrite_acc"][0] < 1
    assert_same_state(before, state_of(editor.model))
    own = MoEEditor.from_hparams(given)
    ours, _, _ = own.edit(**call, sequential_edit=True)
    metrics, _, _ = editor.edit(**call, sequential_edit=True, verbose=False)
    assert_same_scores(metrics, ours)
    assert_same_state(state_of(own.model), state_of(editor.model))
    assert (tmp_path / "data" / "stats").is_dir()


@pytest.mark.parametrize(
    ("family", "name", "dtype"),
    [
        ("gpt_oss", "my-t5", "float32"),
        ("qwen3_moe", "gpt-3.5-t5", "float32"),
        ("olmoe", "olmoe", "bfloat16"),
    ],
)
def test_a_name_that_misleads_easyedit_is_just_a_name(
    family: str, name: str, dtype: str, host: ModuleType, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / name
    tiny_model(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    hp = hparams(data, "Global", model_name=str(folder), dtype=dtype, v_num_grad_steps=2, metric="identity")
    editor = host.BaseEditor.from_hparams(hp)
    own = MoEEditor.from_hparams(hp)
    assert editor.tok(TEXTS[0])["input_ids"] == tiny_tokenizer()(TEXTS[0])["input_ids"]
    assert type(editor.model) is type(own.model)
    assert next(editor.model.parameters()).dtype is getattr(torch, dtype)
    theirs, _, _ = editor.edit(**everything(), sequential_edit=True)
    ours, _, _ = own.edit(**everything(), sequential_edit=True)
    assert_same_state(state_of(own.model), state_of(editor.model))
    if dtype == "float32":  # in bfloat16 the best token can depend on what else is in the batch
        assert_same_scores(theirs, ours)


# ---------------------------------------------------------------- failures


@pytest.fixture
def fail_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let EasyEdit's scoring fail after so many calls."""

    def plan(calls: int) -> None:
        from easyeditor.editors import editor as module

        original, seen = module.compute_edit_quality, []

        def compute(*args: Any, **kwargs: Any) -> Any:
            seen.append(1)
            if len(seen) > calls:
                raise RuntimeError("planted")
            return original(*args, **kwargs)

        monkeypatch.setattr(module, "compute_edit_quality", compute)

    return plan


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(("call", "calls", "kept"), [("edit", 4 + 1, 1), ("batch_edit", 4 + 2, 2)])
def test_an_edit_whose_scoring_fails_is_taken_back(
    call: str, calls: int, kept: int, sequential: bool, pair: Any, fail_after: Any
) -> None:
    both = pair("MoE-AlphaEdit", batch_size=2)
    fail_after(calls)
    with pytest.raises(RuntimeError, match="planted"):
        getattr(both.host, call)(**LISTS, sequential_edit=sequential, verbose=False)
    if sequential:
        lists = {name: values[:kept] for name, values in LISTS.items()}
        getattr(both.own, call)(**lists, sequential_edit=True, verbose=False)
        assert len(both.host.memory.keys[1]) == len(both.own.memory.keys[1])
    else:
        assert both.host.memory is None
    assert_same_state(state_of(both.own.model), state_of(both.host.model))
    assert both.host.hparams.batch_size == 2


def test_scoring_before_the_edit_fails(pair: Any, fail_after: Any) -> None:
    both = pair()
    before = state_of(both.host.model)
    both.host.edit(PROMPTS[0], TARGETS[0], subject=SUBJECTS[0], sequential_edit=True, verbose=False)
    edited = state_of(both.host.model)
    fail_after(0)
    with pytest.raises(RuntimeError, match="planted"):
        both.host.edit(PROMPTS[1], TARGETS[1], subject=SUBJECTS[1], verbose=False)
    assert_same_state(edited, state_of(both.host.model))
    assert changed(before, both.host.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subject": None}, "needs the subject"),
        ({"subject": SUBJECTS[:2]}, "subject has 2 entries for 4 prompts"),
        ({"target_new": TARGETS[:3]}, "target_new has 3 entries"),
        ({"subject": [*SUBJECTS[:3], "Peru"]}, r"Request 3: .*Peru"),
        ({"target_new": [*TARGETS[:3], " "]}, "Request 3: 'target_new' is empty"),
        ({"rephrase_prompts": PROMPTS[:1]}, "rephrase_prompt has 1 entries"),
        ({"locality_inputs": {"near": {"prompt": PROMPTS}}}, r"locality_inputs\['near'\] must hold"),
    ],
)
@pytest.mark.parametrize("call", ["edit", "batch_edit"])
def test_unusable_requests_change_nothing(call: str, change: dict[str, Any], message: str, pair: Any) -> None:
    editor = pair().host
    before = state_of(editor.model)
    with pytest.raises(RequestError, match=message):
        getattr(editor, call)(**(LISTS | change), sequential_edit=True)
    assert_same_state(before, state_of(editor.model))


def test_other_unusable_requests(pair: Any) -> None:
    editor = pair(batch_size=4).host
    with pytest.raises(RequestError, match="list of requests is empty"):
        editor.edit_requests([])
    with pytest.raises(RequestError, match="needs the subject"):
        editor.normal_edit(PROMPTS, TARGETS)
    twice = {name: values[:1] * 2 for name, values in LISTS.items()}
    with pytest.raises(RequestError, match="are the same"):
        editor.batch_edit(**twice)
    with pytest.raises(RequestError, match="are the same"):
        editor.normal_edit(twice["prompts"], twice["target_new"], subject=twice["subject"])


@pytest.mark.parametrize("size", [0, -1, 2.5, "4", None, True])
def test_a_batch_size_that_means_nothing_is_refused(size: Any, pair: Any) -> None:
    editor = pair().host
    before = state_of(editor.model)
    editor.hparams.batch_size = size
    with pytest.raises(HyperParamsError, match="batch_size must be"):
        editor.batch_edit(**LISTS)
    assert_same_state(before, state_of(editor.model))


@pytest.mark.parametrize("given", [None, ("a", "b"), (nn.Linear(2, 2),), 3])
def test_a_model_that_is_neither_name_nor_pair(given: Any, host: ModuleType, data: Path) -> None:
    hp = hparams(data)
    hp.model_name = given
    with pytest.raises(HyperParamsError, match=r"must be a name, a folder, or a pair"):
        host.BaseEditor.from_hparams(hp)


def test_hparams_changed_after_construction_take_effect(pair: Any) -> None:
    both, fresh = pair(batch_size=4), pair(batch_size=2, lambda_reg=0.5)
    both.host.edit(PROMPTS[0], TARGETS[0], subject=SUBJECTS[0], verbose=False)
    both.host.hparams.lambda_reg = 0.5
    both.host.hparams.batch_size = 2
    for editor in (both.host, fresh.host):
        editor.batch_edit(**LISTS, sequential_edit=True, verbose=False)
    assert_same_state(state_of(fresh.host.model), state_of(both.host.model))
    both.host.hparams.v_lr = -1.0
    with pytest.raises(HyperParamsError, match="v_lr must be greater than 0"):
        both.host.edit(PROMPTS[0], TARGETS[0], subject=SUBJECTS[0], verbose=False)
    assert_same_state(state_of(fresh.host.model), state_of(both.host.model))


def test_the_user_s_hparams_stay_as_they_are(host: ModuleType, data: Path) -> None:
    hp, model, tok = hparams(data), tiny_model(), tiny_tokenizer()
    hp.model_name = (model, tok)
    editors = [host.BaseEditor.from_hparams(hp) for _ in range(2)]
    assert hp.model_name == (model, tok)
    assert all(editor.model is model and editor.tok is tok for editor in editors)


# ---------------------------------------------------------------- logs


def test_logs_go_to_the_working_folder_and_only_once(
    pair: Any, host: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from easyeditor.editors.editor import LOG

    monkeypatch.setattr(LOG, "handlers", [])
    root = list(logging.getLogger().handlers)
    both = pair()
    handlers = list(LOG.handlers)
    pair()
    assert LOG.handlers == handlers
    assert logging.getLogger().handlers == root
    metrics, _, _ = both.host.edit(PROMPTS[0], TARGETS[0], subject=SUBJECTS[0])
    for handler in handlers:
        handler.close()
    assert (tmp_path / "logs" / "run.log").read_text().count(f"0 editing: {PROMPTS[0]}") == 1
    saved = json.loads((tmp_path / "logs" / "results.json").read_text())
    assert saved[0]["post"]["rewrite_acc"] == metrics[0]["post"]["rewrite_acc"]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["results.json", "run.log"]


def test_no_keyword_is_ignored(pair: Any) -> None:
    editor = pair().host
    before = state_of(editor.model)
    refused = [
        ("edit", "metrics_kwargs", "Did you mean 'metric_kwargs'"), ("batch_edit", "pre_file", "own scores"),
        ("generate_edit", "pre_edit", "own scores"), ("generate_edit", "evaluation_type", "own scores"),
    ]  # fmt: skip
    for call, name, message in refused:
        with pytest.raises(KeywordError, match=f"{call} .*{message}"):
            getattr(editor, call)(**LISTS, **{name: "x"})
    with pytest.raises(KeywordError, match=r"apply_algo has no keyword 'kopy'\. Did you mean 'copy'"):
        editor.apply_algo(editor.model, editor.tok, FACTS[:1], editor.hparams, kopy=True)
    assert_same_state(before, state_of(editor.model))


@pytest.mark.parametrize("parent", ["super", "named", "reordered"])
def test_subclasses_of_their_editor_get_our_calls_and_keep_their_own(
    parent: str, pair: Any, host: ModuleType, data: Path
) -> None:
    class Loud(host.BaseEditor):
        shouts = 0

        def edit(self, *args: Any, **kwargs: Any) -> Any:
            self.shouts += 1
            return super().edit(*args, **kwargs)

    class Named(Loud):
        def __init__(self, hparams: Any) -> None:
            host.BaseEditor.__init__(self, hparams)

    class Reordered(Loud):
        def __init__(self, name: str, hparams: Any) -> None:
            super().__init__(hparams)
            self.name = name

    both = pair()
    hp = hparams(data, "Global", v_num_grad_steps=3, v_lr=0.5, clamp_norm_factor=20, lambda_reg=1e-3)
    hp.model_name = (tiny_model(), tiny_tokenizer())
    cls = {"super": Loud, "named": Named, "reordered": Reordered}[parent]
    editor = cls("mine", hp) if parent == "reordered" else cls.from_hparams(hp)
    assert isinstance(editor, cls)
    assert isinstance(editor, type(both.host))
    assert type(editor).__name__ == cls.__name__
    theirs, _, _ = both.host.edit(**LISTS, verbose=False, sequential_edit=True)
    ours, _, _ = editor.edit(**LISTS, verbose=False, sequential_edit=True)
    assert editor.shouts == 1
    assert_same_scores(theirs, ours)
    assert_same_state(state_of(both.host.model), state_of(editor.model))
    assert cls.__new__(cls, hp).__class__ is type(editor)


# ---------------------------------------------------------------- empty groups


EMPTY = [
    {},
    {"near": {}},
    {"near": {"prompt": [], "ground_truth": []}},
    {"near": {"prompt": [[]] * 4, "ground_truth": [[]] * 4}},
]


@pytest.mark.parametrize("call", ["edit", "batch_edit"])
@pytest.mark.parametrize("empty", EMPTY, ids=str)
def test_empty_groups_ask_nothing(empty: dict[str, Any], call: str, pair: Any) -> None:
    both = pair(batch_size=4)
    given = {"locality_inputs": empty, "portability_inputs": empty, "verbose": False}
    theirs, _, _ = getattr(both.host, call)(**LISTS, **given)
    ours, _, _ = getattr(both.own, call)(**LISTS, **given)
    assert_same_scores(theirs, ours)
    assert theirs[0]["post"]["locality"] == theirs[0]["post"]["portability"] == {}
    request = FACTS[0] | {"locality": None, "portability": {"near": {"prompt": [], "ground_truth": []}}}
    metrics, _, _ = both.host.edit_requests([request], verbose=False)
    assert metrics[0]["post"]["rewrite_acc"] == theirs[0]["post"]["rewrite_acc"]


# ---------------------------------------------------------------- settings of EasyEdit's scores


CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}<answer>"


def short_answers(editor: Any) -> None:
    generate = editor.model.generate
    editor.model.generate = lambda *args, **kwargs: generate(*args, **{**kwargs, "max_new_tokens": 3})


@pytest.mark.parametrize("call", ["edit", "batch_edit"])
def test_free_answers_are_scored_as_easyedit_does(call: str, pair: Any) -> None:
    tok = tiny_tokenizer()
    tok.chat_template = CHAT
    editor = pair(tok=tok, batch_size=2).host
    before = state_of(editor.model)
    short_answers(editor)
    metrics, _, _ = getattr(editor, call)(**everything(), evaluation_type="LLM-judge")
    for entry in metrics:
        assert entry["post"]["metric_meta"]["rewrite"]["scorer"] == "exact_match"
        assert entry["post"]["rewrite_acc"] in ([0.0], [1.0])
        assert isinstance(entry["post"]["rewrite_gen_content"][0], str)
        assert len(entry["post"]["locality"]["many_gen_content"]) == len(entry["post"]["locality"]["many_acc"]) == 2
    texts, _, _ = getattr(editor, call)(**everything(), evaluation_type="generate-text")
    assert [e["post"]["rewrite_gen_content"] for e in texts] == [e["post"]["rewrite_gen_content"] for e in metrics]
    assert "rewrite_acc" not in texts[0]["post"]
    assert not changed(before, editor.model)


def test_a_judge_is_asked_with_the_key(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from easyeditor.evaluate import evaluate_utils

    asked = []
    monkeypatch.setattr(evaluate_utils, "llm_judge", lambda *args: asked.append(args) or 1.0)
    monkeypatch.setattr("easyedit_moe.host.scoring.importlib.util.find_spec", lambda name: name)
    tok = tiny_tokenizer()
    tok.chat_template = CHAT
    editor = pair(tok=tok).host
    short_answers(editor)
    metrics, _, _ = editor.edit(
        PROMPTS[0], TARGETS[0], subject=SUBJECTS[0], evaluation_type="LLM-judge", api_key="k", verbose=False
    )
    assert [(args[0], args[1], args[3]) for args in asked] == [(PROMPTS[0], TARGETS[0], "k")] * 2
    assert metrics[0]["post"]["rewrite_acc"] == [1.0]
    assert "k" not in vars(editor.hparams).values()


def test_prompts_are_scored_in_the_chat_template(pair: Any) -> None:
    tok = tiny_tokenizer()
    tok.chat_template = CHAT
    editor = pair(tok=tok).host
    rows: list[str] = []
    editor.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: rows.extend(tok.decode(ids) for ids in args[0])
    )
    call = {"prompts": PROMPTS[0], "target_new": TARGETS[0], "subject": SUBJECTS[0], "verbose": False}
    editor.edit(**call)
    assert not any("<user>" in row for row in rows)
    rows.clear()
    editor.edit(**call, use_chat_template=True)
    assert rows.count(f"<user> {PROMPTS[0]} <answer> {TARGETS[0]}") == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"evaluation_type": "judge"}, "evaluation_type must be None or one of 'LLM-judge', 'generate-text'"),
        ({"evaluation_type": "generate-text"}, "evaluation_type='generate-text' asks in the tokenizer's chat template"),
        ({"use_chat_template": True}, "use_chat_template=True asks in the tokenizer's chat template"),
        ({"api_key": "k"}, "api_key has an effect only with evaluation_type='LLM-judge'"),
    ],
)
@pytest.mark.parametrize("call", ["edit", "batch_edit"])
def test_settings_of_scores_that_mean_nothing_are_refused(
    call: str, given: dict[str, Any], message: str, pair: Any
) -> None:
    editor = pair().host
    before = state_of(editor.model)
    with pytest.raises(KeywordError, match=message):
        getattr(editor, call)(**LISTS, **given, sequential_edit=True)
    assert_same_state(before, state_of(editor.model))


# ---------------------------------------------------------------- loops, bars, what is missing


def test_a_loop_over_apply_algo_remembers(pair: Any) -> None:
    both = pair(remember_edits=True, metric="identity")
    editor, own = both.host, both.own
    for number, fact in enumerate(FACTS):
        _, weights = editor.apply_algo(editor.model, editor.tok, [fact], editor.hparams, return_orig_weights=True)
        if number == 1:  # a trial
            for name, original in weights.items():
                editor.model.get_parameter(name).data.copy_(original)
    kept = [FACTS[0], *FACTS[2:]]
    own.edit(None, None, requests=kept, sequential_edit=True, verbose=False)
    assert_same_state(state_of(own.model), state_of(editor.model))


@pytest.mark.parametrize("home", ["host", "own"])
@pytest.mark.parametrize("verbose", [True, False])
def test_bars_obey_verbose(verbose: bool, home: str, pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from easyedit_moe.targets import search

    shown: list[bool] = []
    original = search.progress_bar

    def recording(*args: Any, **kwargs: Any) -> Any:
        bar = original(*args, **kwargs)
        shown.append(kwargs.get("shown", args[3] if len(args) > 3 else True))
        return bar

    monkeypatch.setattr(search, "progress_bar", recording)
    editor = getattr(pair(), home)
    editor.edit(PROMPTS[0], TARGETS[0], subject=SUBJECTS[0], verbose=verbose)
    assert shown
    assert set(shown) == {verbose}
    shown.clear()
    editor.normal_edit(PROMPTS[:1], TARGETS[:1], subject=SUBJECTS[:1])
    assert set(shown) == {True}


@pytest.mark.parametrize("call", ["edit", "batch_edit", "edit_requests"])
@pytest.mark.parametrize("missing", ["nltk", "punkt_tab", "punkt"])
def test_test_generation_names_what_is_missing(
    missing: str, call: str, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def word_tokenize(text: str) -> list[str]:
        raise LookupError(f"Resource {missing} not found. >>> nltk.download('{missing}')")

    nltk = SimpleNamespace(word_tokenize=word_tokenize, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "nltk", None if missing == "nltk" else nltk)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if missing == "nltk" else name)
    editor = pair(batch_size=4).host
    before = state_of(editor.model)
    given = {"requests": FACTS} if call == "edit_requests" else LISTS
    wanted = "pip install nltk.*punkt_tab" if missing == "nltk" else f"python -m nltk.downloader {missing}$"
    with pytest.raises(HostError, match=f"test_generation=True needs nltk.*{wanted}"):
        getattr(editor, call)(**given, test_generation=True, sequential_edit=True)
    assert_same_state(before, state_of(editor.model))
