from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from solving_editors import changed_parameters, down_projections, hparams
from tiny import assert_same_state, requests, state_of, tiny_model, tiny_tokenizer
from torch import nn

from easyedit_moe import editor as editor_module
from easyedit_moe.editor import MoEEditor
from easyedit_moe.editors import editor_class
from easyedit_moe.errors import DataError, HyperParamsError, KeywordError, PatchError, RequestError
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.files import load_patch
from easyedit_moe.patches.merging import merge

TOK = tiny_tokenizer()
FACTS = requests(4)
PROMPTS, SUBJECTS, TARGETS, TRUTHS = (
    [f[name] for f in FACTS] for name in ("prompt", "subject", "target_new", "ground_truth")
)
REPHRASED = [f"We know that {p}" for p in PROMPTS]
LISTS = {"prompts": PROMPTS, "target_new": TARGETS, "ground_truth": TRUTHS, "subject": SUBJECTS}


pytestmark = pytest.mark.usefixtures("no_editing_warnings")


@pytest.fixture
def make(data: Path) -> Any:
    def build(variant: str = "Global", model: nn.Module | None = None, **changes: Any) -> MoEEditor:
        strong = {"v_num_grad_steps": 8, "v_lr": 0.5, "clamp_norm_factor": 20, "lambda_reg": 1e-3}
        hp = hparams(data, variant, **(strong | changes))
        return MoEEditor.from_hparams(hp, model or tiny_model(), TOK)

    return build


def greedy_tokens(model: nn.Module, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """The most likely token at each place of the answer, and the answer's tokens, by one plain forward."""
    ids, labels = TOK(prompt)["input_ids"], TOK(" " + answer)["input_ids"]
    with torch.no_grad():
        best = model(torch.tensor([ids + labels])).logits[0].argmax(-1).tolist()
    return best[len(ids) - 1 : len(ids) - 1 + len(labels)], labels


def accuracy(model: nn.Module, prompt: str, answer: str) -> float:
    best, labels = greedy_tokens(model, prompt, answer)
    return sum(a == b for a, b in zip(best, labels, strict=True)) / len(labels)


# ---------------------------------------------------------------- shapes of results


def test_single_strings(make: Any) -> None:
    editor = make()
    before = state_of(editor.model)
    metrics, model, weights = editor.edit(PROMPTS[0], TARGETS[0], TRUTHS[0], subject=SUBJECTS[0])
    assert model is editor.model
    assert len(metrics) == 1
    entry = metrics[0]
    assert set(entry) == {"case_id", "requested_rewrite", "time", "pre", "post"}
    assert entry["case_id"] == 0
    assert entry["time"] > 0
    assert entry["requested_rewrite"] == FACTS[0] | {"locality": {}, "portability": {}}
    assert set(entry["pre"]) == set(entry["post"]) == {"rewrite_acc", "locality", "portability"}
    assert isinstance(entry["post"]["rewrite_acc"], list)
    assert set(weights) == down_projections(model, [1, 2])
    assert all(torch.equal(w, before["parameters"][n]) for n, w in weights.items())
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("call", ["edit", "batch_edit"])
@pytest.mark.parametrize("sequential", [False, True])
def test_everything_that_easyedit_reports(call: str, sequential: bool, make: Any) -> None:
    editor = make(batch_size=2)
    locality = {
        "neighborhood": {
            "prompt": ["Kenya is in", None, "Zwolle lies in", "Rome is in"],
            "ground_truth": ["Africa", None, "Leiden", "Japan"],
        },
        "many": {"prompt": [["The fox", "The dog"]] * 4, "ground_truth": [["jumps", "is lazy"]] * 4},
    }  # fmt: skip
    portability = {"reasoning": {"prompt": [f"So, {p}" for p in PROMPTS], "ground_truth": TARGETS}}
    plain = tiny_model()
    metrics, model, _ = getattr(editor, call)(
        **LISTS, rephrase_prompts=REPHRASED, locality_inputs=locality, portability_inputs=portability,
        target_neg=TRUTHS, sequential_edit=sequential, verbose=False, keep_original_weight=True, test_generation=False,
    )  # fmt: skip
    assert [m["case_id"] for m in metrics] == [0, 1, 2, 3]
    assert [m["requested_rewrite"]["prompt"] for m in metrics] == PROMPTS
    assert [m["requested_rewrite"]["target_neg"] for m in metrics] == TRUTHS
    for i, entry in enumerate(metrics):
        pre, post = entry["pre"], entry["post"]
        assert set(pre) == set(post) == {"rewrite_acc", "rephrase_acc", "locality", "portability"}
        assert pre["locality"] == {}
        assert set(post["locality"]) == ({"many_acc"} if i == 1 else {"neighborhood_acc", "many_acc"})
        assert [len(v) for v in post["locality"].values()] == ([2] if i == 1 else [1, 2])
        assert set(pre["portability"]) == set(post["portability"]) == {"reasoning_acc"}
        for section in (pre, post, pre["portability"], post["portability"], post["locality"]):
            for values in section.values():
                assert isinstance(values, dict) or all(0 <= v <= 1 for v in values)
        if call == "edit" or not sequential or i < 2:
            assert pre["rewrite_acc"] == [pytest.approx(accuracy(plain, PROMPTS[i], TARGETS[i]))]
            assert pre["rephrase_acc"] == [pytest.approx(accuracy(plain, REPHRASED[i], TARGETS[i]))]
            assert pre["portability"]["reasoning_acc"] == [
                pytest.approx(accuracy(plain, f"So, {PROMPTS[i]}", TARGETS[i]))
            ]
    if sequential:
        last = metrics[-1]
        assert last["post"]["rewrite_acc"] == [pytest.approx(accuracy(model, PROMPTS[3], TARGETS[3]))]
        assert last["post"]["rephrase_acc"] == [pytest.approx(accuracy(model, REPHRASED[3], TARGETS[3]))]
    if sequential and call == "edit":
        pairs = [greedy_tokens(m, "Rome is in", "Japan")[0] for m in (plain, model)]
        same = sum(a == b for a, b in zip(*pairs, strict=True)) / len(pairs[0])
        assert last["post"]["locality"]["neighborhood_acc"] == [pytest.approx(same)]


def test_an_edit_shows_in_the_metrics(make: Any) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    editor = make(model=model, v_num_grad_steps=60, layers=[1], lambda_reg=1e-6, kl_factor=0, v_weight_decay=0)
    fact = requests(5)[4] | {"target_new": "and"}
    unrelated = {"neighborhood": {"prompt": ["The quick brown fox"], "ground_truth": ["jumps over the lazy dog"]}}
    metrics, _, _ = editor.edit(
        [fact["prompt"]], [fact["target_new"]], None, subject=[fact["subject"]], locality_inputs=unrelated,
        rephrase_prompts=["The dog. " + fact["prompt"]],
    )  # fmt: skip
    assert metrics[0]["pre"]["rewrite_acc"] == [0]
    assert metrics[0]["post"]["rewrite_acc"] == [1]
    assert 0 <= metrics[0]["post"]["locality"]["neighborhood_acc"][0] <= 1


# ---------------------------------------------------------------- sequential or not


def test_edits_that_are_not_sequential_see_the_same_model(make: Any) -> None:
    editor = make()
    before, seen = state_of(editor.model), []
    plain = editor.editor.edit

    def watching(model: nn.Module, *args: Any) -> Any:
        seen.append(changed_parameters(before, model))
        return plain(model, *args)

    editor.editor.edit = watching
    metrics, _, weights = editor.edit(**LISTS, sequential_edit=False)
    assert seen == [set()] * 4
    assert_same_state(before, state_of(editor.model))
    assert editor.patches == []
    assert len(metrics) == 4
    assert all(torch.equal(w, before["parameters"][n]) for n, w in weights.items())


def test_sequential_edits_accumulate_and_can_be_undone(make: Any) -> None:
    editor, single = make("MoE-AlphaEdit"), make("MoE-AlphaEdit")
    states = [state_of(editor.model)]
    _, model, weights = editor.edit(**LISTS, sequential_edit=True)
    assert len(editor.patches) == 4
    assert len(editor.memory.keys[1]) == 4
    for i in range(4):
        single.edit(PROMPTS[i], TARGETS[i], subject=SUBJECTS[i], sequential_edit=True)
        states.append(state_of(single.model))
    assert_same_state(states[4], state_of(model))
    assert all(torch.equal(w, states[3]["parameters"][n]) for n, w in weights.items())
    for i in (3, 2, 1, 0):
        editor.undo()
        assert_same_state(states[i], state_of(model))
        assert (len(editor.memory.keys[1]) if editor.memory else 0) == i
    with pytest.raises(RequestError, match="no edit to undo"):
        editor.undo()
    editor.edit(PROMPTS[0], TARGETS[0], subject=SUBJECTS[0], sequential_edit=True)
    assert_same_state(states[1], state_of(model))


def test_a_trial_between_sequential_edits_leaves_no_trace(make: Any) -> None:
    editor, plain = make("MoE-AlphaEdit"), make("MoE-AlphaEdit")
    for e in (editor, plain):
        e.edit(PROMPTS[0], TARGETS[0], subject=SUBJECTS[0], sequential_edit=True)
    editor.edit(PROMPTS[1], TARGETS[1], subject=SUBJECTS[1])
    for e in (editor, plain):
        e.edit(PROMPTS[2], TARGETS[2], subject=SUBJECTS[2], sequential_edit=True)
    assert_same_state(state_of(plain.model), state_of(editor.model))
    assert len(editor.patches) == 2


def test_undo_refuses_what_something_else_changed(make: Any) -> None:
    editor = make()
    editor.edit(PROMPTS[0], TARGETS[0], subject=SUBJECTS[0], sequential_edit=True)
    with torch.no_grad():
        editor.model.model.layers[1].mlp.experts.down_proj += 1
    with pytest.raises(PatchError, match="was changed after"):
        editor.undo()
    assert len(editor.patches) == 1
    with torch.no_grad():
        editor.model.model.layers[1].mlp.experts.down_proj.copy_(tiny_model().model.layers[1].mlp.experts.down_proj)


def test_sequential_edits_name_the_patch_they_were_made_on(make: Any, tmp_path: Path) -> None:
    editor = make()
    editor.edit_requests(FACTS[:3], sequential_edit=True, verbose=False)
    first, second, third = editor.patches
    assert [patch.parent for patch in editor.patches] == [None, first.id, second.id]
    editor.undo()
    editor.edit_requests(FACTS[3:], verbose=False)  # a trial is no parent
    editor.edit_requests(FACTS[3:], sequential_edit=True, verbose=False)
    assert editor.patches[-1].parent == second.id != third.id
    for i, patch in enumerate(editor.patches):
        patch.save(tmp_path / f"{i}.safetensors")
    parts = [load_patch(tmp_path / f"{i}.safetensors") for i in range(3)]
    model = tiny_model()
    with pytest.raises(PatchError, match=second.id):
        parts[2].apply(model)
    merge(parts).apply(model)
    assert_same_state(state_of(editor.model), state_of(model))
    for _ in range(3):
        editor.undo()
    assert editor.parent is None
    editor.edit_requests(FACTS[:1], sequential_edit=True, verbose=False)
    assert editor.patches[0].parent is None


def test_an_edit_that_cannot_be_reverted_is_taken_back_before_the_complaint(make: Any, monkeypatch: Any) -> None:
    editor = make()
    before = state_of(editor.model)

    class Meddling:
        def before(self, batch: Any) -> list[Any]:
            return [None for _ in batch]

        def measured(self, before: Any) -> None:
            pass

        def after(self, number: int, batch: Any) -> list[Any]:
            name = "model.layers.1.mlp.experts.down_proj"
            with torch.no_grad():
                editor.model.get_parameter(name).mul_(2)
            return [None for _ in batch]

        def entry(self, request: Any, before: Any, after: Any) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(editor, "scorer", lambda **options: Meddling())
    with pytest.raises(PatchError, match="was changed after"):
        editor.edit_requests(FACTS[:1], verbose=False)
    written = {name for name, p in editor.model.named_parameters() if not torch.equal(p, before["parameters"][name])}
    now = state_of(editor.model)["parameters"]
    # The experts of the edit have their originals again; others are as the meddler left them.
    view, start = MoELayerView(editor.model), before["parameters"]["model.layers.1.mlp.experts.down_proj"]
    restored = [e for e in range(8) if torch.equal(view.layers[1].experts.read(e), start[e])]
    assert restored
    assert written == {"model.layers.1.mlp.experts.down_proj"}
    others = [e for e in range(8) if e not in restored]
    assert torch.equal(now["model.layers.1.mlp.experts.down_proj"][others], 2 * start[others])
    assert editor.patches == []


def test_batches(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    editor, sizes = make(batch_size=3), []
    before, plain = state_of(editor.model), editor.editor.edit
    monkeypatch.setattr(
        editor.editor, "edit", lambda m, t, batch, mem: sizes.append(len(batch)) or plain(m, t, batch, mem)
    )
    metrics, _, _ = editor.batch_edit(**LISTS)
    assert sizes == [3, 1]
    assert [m["requested_rewrite"]["subject"] for m in metrics] == SUBJECTS
    assert_same_state(before, state_of(editor.model))
    editor.batch_edit(**LISTS, sequential_edit=True)
    assert sizes == [3, 1, 3, 1]
    assert len(editor.patches) == 2
    editor.undo()
    editor.undo()
    assert_same_state(before, state_of(editor.model))


def test_requests_as_dicts_of_any_layout(make: Any) -> None:
    rome = {
        "prompt": "{} is in",
        "subject": "Angola",
        "target_new": {"str": "Russia"},
        "target_true": {"str": "Africa"},
    }
    nested = {"requested_rewrite": rome, "locality": {"near": {"prompt": "Kenya is in", "ground_truth": "Africa"}}}
    parsed = EditRequest("Angola is in", "Angola", "Russia", "Africa")
    easy = {"prompt": "Angola is in", "subject": "Angola", "target_new": "Russia", "ground_truth": "Africa"}
    found = []
    for request in (easy, rome, nested, parsed):
        editor = make()
        metrics, model, _ = editor.edit_requests([request], sequential_edit=True)
        assert metrics[0]["requested_rewrite"]["prompt"] == "Angola is in"
        assert metrics[0]["requested_rewrite"]["target_new"] == "Russia"
        found.append((metrics[0]["post"]["rewrite_acc"], model))
        if request is nested:
            assert set(metrics[0]["post"]["locality"]) == {"near_acc"}
    for acc, model in found[1:]:
        assert acc == found[0][0]
        assert_same_state(state_of(found[0][1]), state_of(model))
    given = make()
    given.edit(None, None, requests=[easy], sequential_edit=True)
    assert_same_state(state_of(found[0][1]), state_of(given.model))


def test_progress_is_logged_not_printed(make: Any, caplog: Any, capsys: Any) -> None:
    caplog.set_level(logging.INFO, "easyedit_moe.editor")
    make().edit(PROMPTS[0], TARGETS[0], subject=SUBJECTS[0], verbose=False)
    assert "Polish" not in caplog.text
    make().edit(PROMPTS[0], TARGETS[0], subject=SUBJECTS[0])
    assert "Danielle Darrieux speaks -> Polish" in caplog.text
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- what is refused, and changes nothing

NEAR = {"near": {"prompt": ["Kenya is in"] * 4, "ground_truth": ["Africa"] * 4}}


def near(prompt: Any = NEAR["near"]["prompt"], ground_truth: Any = NEAR["near"]["ground_truth"]) -> dict[str, Any]:
    return {"near": {"prompt": prompt, "ground_truth": ground_truth}}


BAD = {
    "no subject": ({"subject": None}, "needs the subject of each fact"),
    "subjects": ({"subject": SUBJECTS[:3]}, "subject has 3 entries for 4 prompts"),
    "one subject": ({"subject": "Angola"}, "subject has 1 entries for 4 prompts"),
    "targets": ({"target_new": [*TARGETS, "x"]}, "target_new has 5 entries for 4 prompts"),
    "no targets": ({"target_new": None}, "Request 0: 'target_new' is missing or empty"),
    "truths": ({"ground_truth": ["x"]}, "ground_truth has 1 entries"),
    "rephrased": ({"rephrase_prompts": REPHRASED[:1]}, "rephrase_prompt has 1 entries"),
    "prompts": ({"prompts": None}, "found None"),
    "absent subject": ({"subject": [*SUBJECTS[:3], "Peru"]}, "Request 3: The subject 'Peru' does not occur"),
    "blank target": ({"target_new": [*TARGETS[:3], " "]}, "Request 3: 'target_new' is empty"),
    "empty": ({"prompts": [], "subject": [], "target_new": [], "ground_truth": []}, "nothing to edit"),
    "locality prompts": ({"locality_inputs": near(["Kenya is in"])}, r"locality_inputs\['near'\] has 1 entries for 4"),
    "locality answers": ({"locality_inputs": near(ground_truth=["a"] * 5)}, r"locality_inputs\['near'\] has 5 entries"),
    "locality without answers": ({"locality_inputs": {"near": {"prompt": ["a"] * 4}}}, "must hold 'prompt' and"),
    "locality of nothing": ({"locality_inputs": near(None)}, "found None"),
    "locality as text": ({"locality_inputs": {"near": "Kenya"}}, "must hold 'prompt' and 'ground_truth'"),
    "locality lists": (
        {"locality_inputs": near([["a", "b"]] * 4, [["a", "b"]] * 3 + [["a"]])},
        r"Request 3: locality\['near'\] has 2 prompts, but 1",
    ),
    "locality answer None": ({"locality_inputs": near(ground_truth=["a"] * 3 + [None])}, "Request 3"),
    "portability answer blank": (
        {"portability_inputs": near(ground_truth=["a"] * 3 + [""])},
        "Request 3: portability near: prompts and answers must be texts",
    ),
    "rephrase of another type": ({"rephrase_prompts": [*REPHRASED[:3], 5]}, "Request 3: rephrase: prompts and answers"),
}  # fmt: skip


@pytest.mark.parametrize("call", ["edit", "batch_edit"])
@pytest.mark.parametrize("name", BAD)
def test_refused_calls_change_nothing(name: str, call: str, make: Any) -> None:
    change, match = BAD[name]
    editor = make(batch_size=1)
    before = state_of(editor.model)
    with pytest.raises(RequestError, match=match):
        getattr(editor, call)(**(LISTS | change), sequential_edit=True)
    assert_same_state(before, state_of(editor.model))
    assert editor.patches == []


def test_conflicts_within_a_batch(make: Any) -> None:
    editor = make()
    before = state_of(editor.model)
    twice = {name: values[:1] * 2 for name, values in LISTS.items()}
    with pytest.raises(RequestError, match="are the same"):
        editor.batch_edit(**twice, sequential_edit=True)
    assert_same_state(before, state_of(editor.model))
    metrics, _, _ = editor.edit(**twice)
    assert len(metrics) == 2
    with pytest.raises(RequestError, match="Request 0: A request must be a dict"):
        editor.edit_requests(["Angola is in"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_measuring_restores_too(
    error: type[BaseException], make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = make()
    before, plain, calls = state_of(editor.model), editor_module.score_targets, []

    def third_fails(*args: Any, **options: Any) -> Any:
        calls.append(changed_parameters(before, editor.model))
        if len(calls) == 3:
            raise error
        return plain(*args, **options)

    monkeypatch.setattr(editor_module, "score_targets", third_fails)
    with pytest.raises(error):
        editor.edit(PROMPTS[:2], TARGETS[:2], subject=SUBJECTS[:2])
    assert calls[2], "the third call measures an edited model"
    assert_same_state(before, state_of(editor.model))
    assert editor.patches == []


def test_warning_about_an_unchanged_answer_comes_once(make: Any) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make().edit(PROMPTS[0], TRUTHS[0], TRUTHS[0], subject=SUBJECTS[0])
    assert sum("equals the ground truth" in str(w.message) for w in seen) == 1


# ---------------------------------------------------------------- construction


def test_from_a_yaml_file(data: Path, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    TOK.save_pretrained(tmp_path / "model")
    hparams(data, "MoTE", model_name=str(tmp_path / "model")).to_yaml(tmp_path / "h.yaml")
    for path in (str(tmp_path / "h.yaml"), tmp_path / "h.yaml"):
        editor = MoEEditor.from_hparams(path)
        assert editor.hparams.alg_name == "MoTE"
        assert_same_state(state_of(tiny_model()), state_of(editor.model))
        assert editor.tok(PROMPTS[0])["input_ids"] == TOK(PROMPTS[0])["input_ids"]
    metrics, _, _ = editor.edit(PROMPTS[0], TARGETS[0], subject=SUBJECTS[0])
    assert len(metrics) == 1


def test_given_model_and_tokenizer_are_used(make: Any, data: Path) -> None:
    model = tiny_model(seed=3)
    assert make(model=model).model is model
    for given in ({"model": model}, {"tok": TOK}):
        with pytest.raises(RequestError, match="model and tok together"):
            MoEEditor.from_hparams(hparams(data), **given)


def test_what_cannot_be_constructed(data: Path, tmp_path: Path) -> None:
    with pytest.raises(HyperParamsError, match="does not exist"):
        MoEEditor.from_hparams(str(tmp_path / "missing.yaml"))
    with pytest.raises(DataError, match="can't be loaded"):
        MoEEditor.from_hparams(hparams(data, model_name=str(tmp_path / "missing")))
    with pytest.raises(HyperParamsError, match="is not there"):
        MoEEditor.from_hparams(hparams(data, device=99))


@pytest.mark.parametrize("call", ["edit", "batch_edit", "edit_requests"])
def test_a_request_is_parsed_once(call: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from easyedit_moe.facts import easyedit_requests
    from easyedit_moe.facts import requests as parsing

    seen: list[str] = []
    plain = parsing.parse_request

    def counting(record: Any) -> EditRequest:
        seen.append(record["prompt"])
        return plain(record)

    for module in (parsing, easyedit_requests):
        monkeypatch.setattr(module, "parse_request", counting)
    given = [
        dict(zip(("prompt", "target_new", "subject"), values, strict=True))
        for values in zip(PROMPTS, TARGETS, SUBJECTS, strict=True)
    ]
    if call == "edit_requests":
        make().edit_requests(given, verbose=False)
    else:
        getattr(make(batch_size=2), call)(PROMPTS, TARGETS, subject=SUBJECTS, verbose=False)
    assert seen == PROMPTS


def test_editors_refuse_what_was_not_parsed(make: Any) -> None:
    editor = make()
    before = state_of(editor.model)
    record = {"prompt": PROMPTS[0], "target_new": TARGETS[0], "subject": SUBJECTS[0]}
    with pytest.raises(RequestError, match=r"takes EditRequest values; found dict.*parse_requests"):
        editor.editor.edit(editor.model, TOK, [record])
    assert_same_state(before, state_of(editor.model))
    for field, value in (("prompt", " "), ("subject", "Peru"), ("target_new", None), ("ground_truth", 3)):
        with pytest.raises(RequestError):
            EditRequest(**(record | {field: value}))


def test_answers_by_free_generation(make: Any) -> None:
    editor = make()
    before = state_of(editor.model)
    generate = editor.model.generate
    editor.model.generate = lambda *args, **kwargs: generate(*args, **{**kwargs, "max_new_tokens": 2})
    results, _, _ = editor.generate_edit(PROMPTS[:2], TARGETS[:2], subject=SUBJECTS[:2], rephrase_prompts=PROMPTS[:2])
    assert [set(entry["post"]) for entry in results] == [{"rewrite_ans", "rephrase_ans"}] * 2
    assert all(isinstance(entry["pre"]["rewrite_ans"], str) for entry in results)
    del editor.model.generate
    assert_same_state(before, state_of(editor.model))


# ---------------------------------------------------------------- keywords


@pytest.mark.parametrize("call", ["edit", "batch_edit", "generate_edit", "edit_requests"])
def test_no_keyword_is_ignored(call: str, make: Any) -> None:
    editor = make()
    before = state_of(editor.model)
    given: dict[str, Any] = {"requests": FACTS[:1]} if call == "edit_requests" else LISTS
    wrong = {
        "sequential_edits": (True, "no keyword 'sequential_edits'. Did you mean 'sequential_edit'"),
        "keep_original_weights": (True, "Did you mean 'keep_original_weight'"),
        "zzz": (1, "no keyword 'zzz'.$"),
        "copy": (True, "copy=True: the model is edited in place"),
        "test_generation": (True, "EasyEdit's own scores"),
        "loc_prompts": (["a"], "WISE"),
        "evaluation_type": ("LLM-judge", "EasyEdit's own scores.*generate_edit"),
        "api_key": ("x", "EasyEdit's own scores.*LLM-judge"),
        "use_chat_template": (True, "set chat: true in the hparams"),
    }
    if call != "edit_requests":
        wrong["rephrase_prompt"] = (PROMPTS, "Did you mean 'rephrase_prompts'")
    for name, (value, message) in wrong.items():
        with pytest.raises(TypeError, match=message) as caught:
            getattr(editor, call)(**given, **{name: value})
        assert isinstance(caught.value, KeywordError)
        assert call in str(caught.value)
    assert_same_state(before, state_of(editor.model))


def test_easyedits_keywords_with_their_defaults_are_taken(make: Any) -> None:
    given = {
        "copy": False,
        "eval_metric": "exact match",
        "train_ds": None,
        "return_orig_weights": True,
        "api_key": None,
    }
    metrics, _, weights = make().edit(PROMPTS[0], TARGETS[0], subject=SUBJECTS[0], verbose=False, **given)
    assert len(metrics) == 1
    assert weights


def test_apply_to_model_has_no_other_keywords(data: Path) -> None:
    model, hp = tiny_model(), hparams(data, "Global")
    before = state_of(model)
    for name, message in (
        ("return_orig_weight", "Did you mean 'return_orig_weights'"),
        ("cache_template", "cached"),
    ):
        with pytest.raises(KeywordError, match=message):
            editor_class("Global").apply_to_model(model, TOK, FACTS[:1], hp, **{name: "x"})
    assert_same_state(before, state_of(model))


# ---------------------------------------------------------------- empty groups, requests beside lists


EMPTY = [
    {},
    {"near": {}},
    {"near": {"prompt": [], "ground_truth": []}},
    {"near": {"prompt": (), "ground_truth": None}},
    {"near": {"prompt": [[]] * 4, "ground_truth": [[]] * 4}},
    {"near": {"prompt": [None] * 4, "ground_truth": [None] * 4}},
]


@pytest.mark.parametrize("call", ["edit", "batch_edit"])
@pytest.mark.parametrize("empty", EMPTY, ids=str)
def test_empty_groups_ask_nothing(empty: dict[str, Any], call: str, make: Any) -> None:
    given = {"locality_inputs": empty, "portability_inputs": empty, "verbose": False}
    metrics, _, _ = getattr(make(), call)(**LISTS, **given)
    plain, _, _ = getattr(make(), call)(**LISTS, verbose=False)
    for entry, other in zip(metrics, plain, strict=True):
        assert (entry["pre"], entry["post"]) == (other["pre"], other["post"])
        assert entry["requested_rewrite"] == other["requested_rewrite"]


@pytest.mark.parametrize("empty", [None, *EMPTY[:4]], ids=str)
def test_empty_groups_of_request_dicts(empty: Any, make: Any) -> None:
    metrics, _, _ = make().edit_requests([FACTS[0] | {"locality": empty, "portability": empty}], verbose=False)
    assert metrics[0]["requested_rewrite"]["locality"] == metrics[0]["post"]["locality"] == {}
    with pytest.raises(RequestError, match="Request 0: 'locality' must be a dict"):
        make().edit_requests([FACTS[0] | {"locality": ["Rome"]}])


@pytest.mark.parametrize("call", ["edit", "batch_edit", "generate_edit"])
@pytest.mark.parametrize("name", ["prompts", "target_new", "subject", "locality_inputs"])
def test_requests_beside_lists_are_refused(name: str, call: str, make: Any) -> None:
    editor = make()
    before = state_of(editor.model)
    value = {"near": {"prompt": PROMPTS, "ground_truth": TARGETS}} if name == "locality_inputs" else PROMPTS
    with pytest.raises(KeywordError, match=f"{call} takes the facts as requests= or as lists.*there is {name}"):
        getattr(editor, call)(**{name: value}, requests=FACTS[:1])
    with pytest.raises(RequestError, match="nothing to edit"):
        getattr(editor, call)(requests=[])
    assert_same_state(before, state_of(editor.model))


@pytest.mark.parametrize("call", ["edit", "batch_edit"])
def test_retention_scores_earlier_edits_again_after_each_later_batch(call: str, make: Any) -> None:
    editor = make(batch_size=3)
    metrics, model, _ = getattr(editor, call)(
        **LISTS, rephrase_prompts=REPHRASED, sequential_edit=True, retention=True, verbose=False,
        locality_inputs={"near": {"prompt": ["Kenya is in"] * 4, "ground_truth": ["Africa"] * 4}},
    )  # fmt: skip
    later = [3, 2, 1, 0] if call == "edit" else [1, 1, 1, 0]
    assert [len(entry["after_batches"]) for entry in metrics] == later
    for entry, prompt, target, count in zip(metrics, PROMPTS, TARGETS, later, strict=True):
        assert entry["after_all"] == (entry["after_batches"][-1] if count else entry["post"])
        assert entry["after_all"]["rewrite_acc"] == [pytest.approx(accuracy(model, prompt, target))]
        assert set(entry["after_all"]) == set(entry["post"])
    if call == "edit":  # after the second edit, for the first one
        again = make()
        _, two, _ = again.edit(PROMPTS[:2], TARGETS[:2], subject=SUBJECTS[:2], sequential_edit=True, verbose=False)
        assert metrics[0]["after_batches"][0]["rewrite_acc"] == [accuracy(two, PROMPTS[0], TARGETS[0])]


def test_retention_needs_edits_that_stay(make: Any) -> None:
    editor = make()
    for call in (editor.edit, editor.batch_edit):
        with pytest.raises(KeywordError, match="retention=True needs sequential_edit=True"):
            call(**LISTS, retention=True)
    with pytest.raises(KeywordError, match="no keyword 'retention'"):
        editor.generate_edit(**LISTS, sequential_edit=True, retention=True)
    metrics, _, _ = editor.edit(PROMPTS[0], TARGETS[0], subject=SUBJECTS[0], retention=False)
    assert "after_all" not in metrics[0]
