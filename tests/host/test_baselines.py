"""EasyEdit's own methods as rows of a comparison. What takes ``host`` needs a checkout of EasyEdit."""

from __future__ import annotations

import importlib
import logging
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from easyedit_methods import settings
from tiny import TEXTS, assert_same_state, requests, state_of, tiny_model, tiny_tokenizer
from torch import Tensor, nn

from easyedit_moe.comparison import report
from easyedit_moe.comparison.compare import compare
from easyedit_moe.comparison.saved import read_results
from easyedit_moe.comparison.task import Task
from easyedit_moe.errors import (
    HostError,
    HyperParamsError,
    LayerError,
    MethodError,
    NoUpdateWarning,
    NumericalError,
    RequestError,
)
from easyedit_moe.facts.records import parse_records
from easyedit_moe.facts.requests import parse_requests
from easyedit_moe.host.baseline_hparams import CLASSES, HOST_METHODS, BaselineHyperParams
from easyedit_moe.host.baselines import BaselineEditor
from easyedit_moe.host.dense_statistics import input_moments, write_projectors
from easyedit_moe.hparams import hparams_folder, read_yaml

FACTS = requests(4)
PARSED = parse_requests(FACTS)
O_PROJ = "model.layers.{}.self_attn.o_proj"
SITES = {"qwen3_moe": O_PROJ, "gpt_oss": O_PROJ, "qwen3_5_moe": "model.layers.{}.linear_attn.out_proj"}


pytestmark = pytest.mark.usefixtures("own_folder", "no_editing_warnings")


def moved(before: dict[str, Any], model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if n in before["parameters"] and differs(before, n, p)}


def differs(before: dict[str, Any], name: str, parameter: Tensor) -> bool:
    return not torch.equal(before["parameters"][name], parameter)


def everything(model: nn.Module, tok: Any) -> dict[str, Any]:
    """All of model, tokenizer and process that a method may have touched."""
    rome = importlib.import_module("easyeditor.models.rome.rome_main")
    alpha = importlib.import_module("easyeditor.models.alphaedit.AlphaEdit_main")
    return state_of(model) | {
        "config": model.config.to_dict(),
        "name": model.config._name_or_path,
        "tokenizer": (tok.padding_side, tok.pad_token),
        "attributes": set(vars(model)),
        "checkpointing": [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "caches": (rome.CONTEXT_TEMPLATES_CACHE, alpha.P_loaded, alpha.cache_c_new, hasattr(alpha, "P")),
    }


def assert_nothing_changed(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert_same_state(before, after)
    tensors = ("parameters", "buffers")
    assert {k: v for k, v in before.items() if k not in tensors} == {k: v for k, v in after.items() if k not in tensors}


# ---------------------------------------------------------------- editing and restoring

WRITING = [method for method in HOST_METHODS if method != "WISE"]  # that has its own tests, in test_wise.py
ROWS = [(method, family, {}) for method in WRITING for family in ("qwen3_moe", "gpt_oss")]
EXPERTS = {"rewrite_module_tmp": "model.layers.{}.mlp.experts.down_proj"}
DENSE = {"rewrite_module_tmp": O_PROJ}
ROWS += [("FT", "qwen3_moe", DENSE), ("MEMIT", "qwen3_5_moe", {"rewrite_module_tmp": SITES["qwen3_5_moe"]})]


def expected_sites(model: nn.Module, hp: BaselineHyperParams) -> set[str]:
    if hp.method == "LoRA":
        return set()
    found = [hp.values["rewrite_module_tmp"].format(layer) for layer in hp.values["layers"]]
    linear = hp.values["alg_name"] != "FT"
    names = {f"{name}.weight" for name in found} if linear else set()
    return names or {n for n, _ in model.named_parameters() if any(name in n for name in found)}


@pytest.mark.parametrize(("method", "family", "changes"), ROWS)
def test_batches_accumulate_and_everything_comes_back(
    method: str, family: str, changes: dict[str, Any], host: ModuleType, data: Path
) -> None:
    model, tok = tiny_model(family), tiny_tokenizer(padding_side="left", pad=False)
    model.model.layers[0].train()
    editor = BaselineEditor(settings(data, method, **changes))
    before = everything(model, tok)
    sites = expected_sites(model, editor.hparams)
    patches, states = [], []
    for batch in (PARSED[:2], PARSED[2:]):
        result = editor.edit(model, tok, batch)
        patches.append(result.patch)
        states.append(state_of(model))
        assert result.seconds["solve"] > 0
        assert result.warnings == []
        told = {p.name: p.relative_update for p in result.diagnosis.parameters}
        assert told.keys() == result.patch.originals.keys()
        for name, original in result.patch.originals.items():
            change = (model.get_parameter(name) - original).norm()
            assert told[name] == pytest.approx(float(change / original.norm()), rel=1e-4)
        assert result.diagnosis.changed is (None if method == "LoRA" and len(patches) == 1 else True)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if method == "LoRA":
        first, second = (s["parameters"] for s in states)
        adapters = [name for name in first if ".lora_" in name]
        assert {name.split("layers.")[1][0] for name in adapters} == {"1", "2"}
        assert any(not torch.equal(first[n], second[n]) for n in adapters)
    else:
        assert moved(before, model) == sites
        assert moved(states[0], model) == sites
        assert {n: f for n, f in states[1].items() if n not in ("parameters", "buffers")} == {
            n: before[n] for n in states[1] if n not in ("parameters", "buffers")
        }
        assert patches[1].weights_copy(model).keys() == sites
    patches[1].restore(model)
    assert_same_state(states[0], state_of(model))
    patches[0].restore(model)
    assert_nothing_changed(before, everything(model, tok))
    patches[0].restore(model)  # again, without harm
    assert_nothing_changed(before, everything(model, tok))


def test_an_edit_of_easyedit_s_that_does_nothing_says_so(host: ModuleType, data: Path) -> None:
    with pytest.warns(NoUpdateWarning, match="every weight is what it was"):
        result = BaselineEditor(settings(data, "FT", lr=0.0)).edit(tiny_model(), tiny_tokenizer(), PARSED[:2])
    assert result.warnings == result.patch.warnings == result.patch.metadata["warnings"] != []


def test_what_a_row_says_of_itself(host: ModuleType, data: Path) -> None:
    for method in HOST_METHODS:
        editor = BaselineEditor(settings(data, method))
        assert editor.code == "easyeditor"
        assert editor.edits == ("experts" if method in ("FT", "FT-L") else "dense site")
        assert editor.target_settings() is None


FAILURES = {
    "ROME": ("rome.rome_main", "compute_v"),
    "MEMIT": ("memit.memit_main", "compute_ks"),
    "AlphaEdit": ("alphaedit.AlphaEdit_main", "compute_ks"),
    "FT": ("ft.ft_main", "AverageMeter.update"),
    "FT-L": ("ft.ft_main", "AverageMeter.update"),
    "LoRA": ("lora.lora_main", "AverageMeter.update"),
    "WISE": ("wise.WISE", "WISE._norm_constraint"),
}


def fail_at(method: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the given call of a part of EasyEdit's method fail, when weights have been changed already."""
    where, name = FAILURES[method]
    owner = importlib.import_module(f"easyeditor.models.{where}")
    if "." in name:
        owner, name = getattr(owner, name.partition(".")[0]), name.partition(".")[2]
    original, calls = getattr(owner, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("planted")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize(
    ("method", "family"), [*((method, "qwen3_moe") for method in HOST_METHODS), ("AlphaEdit", "gpt_oss")]
)
def test_a_failure_half_way_restores(
    method: str, family: str, host: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tok = tiny_model(family), tiny_tokenizer(pad=False)
    editor = BaselineEditor(settings(data, method))
    editor.edit(model, tok, PARSED[3:]).patch.restore(model)  # statistics are there
    before = everything(model, tok)
    with monkeypatch.context() as patching:
        fail_at(method, 2, patching)
        with pytest.raises(HostError, match=f"EasyEdit's {method} failed: RuntimeError: planted"):
            editor.edit(model, tok, PARSED[:2])
    assert_nothing_changed(before, everything(model, tok))
    first = editor.edit(model, tok, PARSED[:2])
    after_first = everything(model, tok)
    with monkeypatch.context() as patching:
        fail_at(method, 2, patching)
        with pytest.raises(HostError, match="planted"):
            editor.edit(model, tok, PARSED[2:])
    assert_nothing_changed(after_first, everything(model, tok))
    first.patch.restore(model)
    assert_nothing_changed(before, everything(model, tok))


# ---------------------------------------------------------------- statistics files


def dense_inputs(model: nn.Module, tok: Any, names: list[str]) -> dict[str, Tensor]:
    """Inputs of modules over the corpus, one text at a time, so that there is no padding."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: rows[name].append(args[0][0]))
        for name in names
    ]
    with torch.no_grad():
        for text in TEXTS:
            model(torch.tensor([tok(text)["input_ids"]]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).double() for name, parts in rows.items()}


@pytest.mark.parametrize("family", SITES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_moments_equal_a_dense_reference(side: str, family: str) -> None:
    model, tok = tiny_model(family), tiny_tokenizer(padding_side=side)
    names = [SITES[family].format(layer) for layer in (0, 2)]
    found = input_moments(model, tok, names, TEXTS, 512, batch_size=3)
    for name, x in dense_inputs(model, tok, names).items():
        moment, count = found[name]
        assert count == len(x) == sum(len(tok(text)["input_ids"]) for text in TEXTS)
        assert moment.dtype is torch.float64
        torch.testing.assert_close(moment, x.T @ x, rtol=1e-5, atol=1e-5)
    _, count = input_moments(model, tok, names[:1], TEXTS, 5)[names[0]]
    assert count == 5 * len(TEXTS)


def test_projectors_span_a_planted_null_space(tmp_path: Path) -> None:
    q, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    values = torch.tensor([1e-4] * 5 + [0.5] * 7, dtype=torch.float64)
    moment = 40 * q @ torch.diag(values) @ q.T
    assert write_projectors(tmp_path / "p.pt", [(moment, 40), (3 * moment, 40)], 1e-3) == [5, 5]
    found = torch.load(tmp_path / "p.pt", weights_only=True)
    assert found.shape == (2, 12, 12)
    torch.testing.assert_close(found.double(), (q[:, :5] @ q[:, :5].T).expand(2, -1, -1), rtol=0, atol=1e-6)
    with pytest.raises(NumericalError, match=r"No eigenvalue lies below nullspace_threshold 1e-05.*Raise"):
        write_projectors(tmp_path / "q.pt", [(moment, 40)], 1e-5)
    assert not (tmp_path / "q.pt").exists()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_files_are_what_easyedit_reads(family: str, host: ModuleType, data: Path, tmp_path: Path) -> None:
    from easyeditor.models.rome.layer_stats import layer_stats

    model, tok = tiny_model(family), tiny_tokenizer()
    names = [O_PROJ.format(layer) for layer in (1, 2)]
    reference = {name: x.T @ x / len(x) for name, x in dense_inputs(model, tok, names).items()}
    spectra = [torch.linalg.eigvalsh(c) for c in reference.values()]
    threshold = float(spectra[0].median() + spectra[1].median()) / 2
    hp = settings(data, "AlphaEdit", stats_dir=str(tmp_path / "stats"), nullspace_threshold=threshold)
    editor = BaselineEditor(hp)
    editor.edit(model, tok, PARSED[:1]).patch.restore(model)
    label, files = editor._prepare(model, tok)
    model.config._name_or_path = label
    for name in names:
        stat = layer_stats(
            model, tok, name, files["stats_dir"], files["mom2_dataset"], to_collect=["mom2"],
            sample_size=files["mom2_n_samples"], precision="float32", hparams=editor._settings(**files),
        )  # fmt: skip
        torch.testing.assert_close(stat.mom2.moment().double(), reference[name], rtol=1e-4, atol=1e-6)
    projectors = torch.load(files["P_loc"], weights_only=True).double()
    for found, (name, c) in zip(projectors, reference.items(), strict=True):
        values, vectors = torch.linalg.eigh(c)
        null = vectors[:, values < threshold]
        assert 0 < null.shape[1] < len(c), name
        gap = (values - threshold).abs().min()
        torch.testing.assert_close(found, null @ null.T, rtol=0, atol=1e-6 / float(gap) + 1e-4)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "stats").rglob("*") if path.is_file()}
    assert len(written) == 3
    BaselineEditor(hp).edit(tiny_model(family), tok, PARSED[:1])  # read again, not made again
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "stats").rglob("*") if path.is_file()}
    assert not (tmp_path / "null_space_project.pt").exists()


@pytest.mark.parametrize("method", ["ROME", "MEMIT", "AlphaEdit"])
def test_models_of_one_name_share_nothing(method: str, host: ModuleType, data: Path, tmp_path: Path) -> None:
    hp = settings(data, method, stats_dir=str(tmp_path / "stats"))
    tok, first, second, alone = tiny_tokenizer(), tiny_model(), tiny_model(seed=1), tiny_model(seed=1)
    BaselineEditor(hp).edit(alone, tok, PARSED[:2])
    editor = BaselineEditor(hp)
    editor.edit(first, tok, PARSED[:2])
    editor.edit(second, tok, PARSED[:2])
    assert_same_state(state_of(alone), state_of(second))
    again = tiny_model(seed=1)
    BaselineEditor(hp).edit(again, tok, PARSED[:2])
    assert_same_state(state_of(alone), state_of(again))
    assert len(list((tmp_path / "stats").iterdir())) == 2
    assert moved(state_of(first), second)


def test_caches_that_were_there_before_are_there_afterwards(host: ModuleType, data: Path) -> None:
    rome = importlib.import_module("easyeditor.models.rome.rome_main")
    inverse = importlib.import_module("easyeditor.models.rome.compute_u")
    alpha = importlib.import_module("easyeditor.models.alphaedit.AlphaEdit_main")
    clean = tiny_model()
    BaselineEditor(settings(data, "AlphaEdit")).edit(clean, tiny_tokenizer(), PARSED[:2])
    mine = {
        (rome, "CONTEXT_TEMPLATES_CACHE"): ["{}", "Mine. {}"], (inverse, "inv_mom2_cache"): {"mine": torch.ones(2)},
        (alpha, "P"): torch.ones(2, 3, 3), (alpha, "P_loaded"): True, (alpha, "cache_c"): torch.ones(2, 3, 3),
        (alpha, "cache_c_new"): True, (alpha, "COV_CACHE"): {"mine": 1},
    }  # fmt: skip
    kept = {key: vars(key[0]).get(key[1]) for key in mine}
    try:
        for (module, name), value in mine.items():
            setattr(module, name, value)
        model = tiny_model()
        BaselineEditor(settings(data, "AlphaEdit")).edit(model, tiny_tokenizer(), PARSED[:2])
        BaselineEditor(settings(data, "ROME")).edit(tiny_model(), tiny_tokenizer(), PARSED[:1])
        for (module, name), value in mine.items():
            assert getattr(module, name) is value
        assert torch.equal(alpha.cache_c, torch.ones(2, 3, 3))
        assert list(inverse.inv_mom2_cache) == ["mine"]
        assert_same_state(state_of(clean), state_of(model))
    finally:
        for (module, name), value in kept.items():
            setattr(module, name, value)
            if value is None and name in ("P", "cache_c"):
                delattr(module, name)


# ---------------------------------------------------------------- the same as EasyEdit alone


def test_rome_is_easyedit_s_rome(host: ModuleType, data: Path) -> None:
    from easyeditor.models.rome import rome_main
    from easyeditor.models.rome.compute_u import inv_mom2_cache

    model, tok = tiny_model(), tiny_tokenizer()
    editor = BaselineEditor(settings(data, "ROME"))
    editor.edit(model, tok, PARSED[:1])
    plain = tiny_model()
    label, files = editor._prepare(model, tok)
    plain.config._name_or_path = label
    rome_main.CONTEXT_TEMPLATES_CACHE = None
    torch.manual_seed(42)
    rome_main.apply_rome_to_model(plain, tok, [FACTS[0]], editor._settings(**files), return_orig_weights=True)
    rome_main.CONTEXT_TEMPLATES_CACHE = None
    inv_mom2_cache.clear()
    assert moved(state_of(tiny_model()), plain) == {O_PROJ.format(1) + ".weight"}
    assert not moved(state_of(plain), model)


@pytest.mark.parametrize("method", ["FT", "FT-L", "LoRA"])
def test_a_batch_of_unequal_lengths_trains_on_the_targets_only(method: str, host: ModuleType, data: Path) -> None:
    """The first loss that EasyEdit prints, against the mean over the targets' tokens of plain forwards."""
    model, tok = tiny_model(), tiny_tokenizer(padding_side="right")
    losses = []
    for fact in FACTS:
        ids, labels = tok(fact["prompt"])["input_ids"], tok(" " + fact["target_new"])["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids + labels])).logits[0, len(ids) - 1 : -1]
        losses.append(nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none"))
    assert len({len(tok(f["prompt"])["input_ids"]) for f in FACTS}) > 1
    each = torch.cat(losses).mean() if method == "LoRA" else torch.stack([loss.mean() for loss in losses]).mean()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    log = logging.getLogger("easyedit_moe.host.baselines")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        BaselineEditor(settings(data, method)).edit(model, tok, PARSED)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    (text,) = [m for m in messages if "Batch loss" in m]
    first = float(text.split("Batch loss ")[1].split()[0])
    assert first == pytest.approx(float(each), rel=1e-4)


# ---------------------------------------------------------------- comparison


def _record(fact: dict[str, str]) -> dict[str, Any]:
    return {
        "requested_rewrite": {
            "prompt": fact["prompt"].replace(fact["subject"], "{}"), "subject": fact["subject"],
            "target_new": {"str": fact["target_new"]}, "target_true": {"str": fact["ground_truth"]},
        },
        "paraphrase_prompts": [f"We know that {fact['prompt']}"],
        "neighborhood_prompts": ["Rome lives in"],
    }  # fmt: skip


@pytest.fixture
def task() -> Callable[[str], Task]:
    def build(family: str = "qwen3_moe") -> Task:
        found = parse_records([_record(fact) for fact in FACTS])
        provenance = {"model": "tiny", "edits": 4, "batch_size": 2, "protocol": "counterfact"}
        return Task(tiny_model(family), tiny_tokenizer(), found.records, found.protocol, 2, provenance)

    return build


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_all_methods_side_by_side(family: str, host: ModuleType, data: Path, task: Any) -> None:
    job = task(family)
    before = everything(job.model, job.tok)
    methods = [method for method in HOST_METHODS if (method, family) != ("WISE", "gpt_oss")]  # o_proj has a bias
    chosen = [settings(data, method) for method in methods]
    result = compare(job, chosen)
    assert_nothing_changed(before, everything(job.model, job.tok))
    rows = {row.method: row for row in result.rows}
    assert list(rows) == ["pre-edit", *methods]
    assert all(rows[method].code == "easyeditor" for method in methods)
    assert {method: rows[method].edits for method in WRITING} == {
        "ROME": "dense site", "MEMIT": "dense site", "AlphaEdit": "dense site", "LoRA": "dense site",
        "FT": "experts", "FT-L": "experts",
    }  # fmt: skip
    assert result.provenance["hparams"]["FT-L"]["alg_name"] == "FT"
    # In another order each method gives the same, and what it gives is the state after both batches.
    again = {row.method: row for row in compare(job, [chosen[2], chosen[0]]).rows}
    for method in again:
        assert again[method].scores == rows[method].scores
    editor = BaselineEditor(chosen[2])
    for start in (0, 2):
        editor.edit(job.model, job.tok, [r.request for r in job.records[start : start + 2]])
    from easyedit_moe.evaluation.metrics import evaluate

    assert evaluate(job.model, job.tok, job.records, job.protocol) == rows["AlphaEdit"].scores


def test_a_dense_model_is_compared_and_nothing_is_said_of_routing(
    host: ModuleType, data: Path, task: Any, tmp_path: Path
) -> None:
    job = task("dense")
    before = everything(job.model, job.tok)
    sites = {"rewrite_module_tmp": "model.layers.{}.mlp.down_proj", "mlp_module_tmp": "model.layers.{}.mlp"}
    chosen = [settings(data, method, **sites) for method in ("MEMIT", "AlphaEdit")]
    result = compare(job, chosen)
    assert_nothing_changed(before, everything(job.model, job.tok))
    assert [row.routing for row in result.rows] == [{}, {}, {}]
    (path, *_) = report.write_results(result, tmp_path)
    assert [row.scores for row in read_results(path).rows] == [row.scores for row in result.rows]
    assert [report.cells(row)[report.COLUMNS.index("routing (kept)")] for row in result.rows] == ["-"] * 3


def test_a_row_that_fails_restores_the_batches_before(
    host: ModuleType, data: Path, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = task()
    before = everything(job.model, job.tok)
    fail_at("LoRA", 4, monkeypatch)  # three steps of the first batch, then the second
    with pytest.raises(HostError, match="planted"):
        compare(job, [settings(data, "LoRA")])
    assert_nothing_changed(before, everything(job.model, job.tok))


# ---------------------------------------------------------------- errors

WRONG = [
    ("MEMIT", {"rewrite_module_tmp": "model.layers.{}.self_attn.x"}, LayerError, r"no module .*x; there is .*o_proj"),
    ("ROME", {"rewrite_module_tmp": "model.layers.{}.attention.out"}, LayerError, r"there is .*layers\.1\.self_attn"),
    ("MEMIT", {"rewrite_module_tmp": "model.layers.{}.mlp.experts"}, LayerError, "no linear module.*dense site"),
    ("MEMIT", {"layers": [1, 9]}, LayerError, r"no module model\.layers\.9"),
    ("FT", {"rewrite_module_tmp": "model.layers.{}.mlp.down_proj"}, LayerError, r"no parameter .*1\.mlp\.down_proj"),
    ("FT", {"layers": [1, 9]}, LayerError, r"no parameter model\.layers\.9"),
    ("AlphaEdit", {"nullspace_threshold": 1e-30}, NumericalError, "Raise the threshold"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "changes", "error", "message"), WRONG)
def test_a_wrong_site_is_named_and_nothing_changes(
    method: str, changes: dict[str, Any], error: type[Exception], message: str, host: ModuleType, data: Path
) -> None:
    model, tok = tiny_model(), tiny_tokenizer()
    before = everything(model, tok)
    with pytest.raises(error, match=message):
        BaselineEditor(settings(data, method, **changes)).edit(model, tok, PARSED[:1])
    assert_nothing_changed(before, everything(model, tok))


def test_keys_are_checked_before_any_work(host: ModuleType, data: Path) -> None:
    with pytest.raises(HyperParamsError, match=r"MEMITHyperParams does not take these hparams.*v_lrate"):
        BaselineEditor(settings(data, "MEMIT", v_lrate=1))
    hp = settings(data, "MEMIT")
    del hp.values["v_lr"]
    with pytest.raises(HyperParamsError, match=r"missing.*v_lr"):
        BaselineEditor(hp)
    with pytest.raises(RequestError, match="an editor takes EditRequest values; found dict"):
        BaselineEditor(settings(data, "MEMIT")).edit(
            tiny_model(), tiny_tokenizer(), [{"prompt": "a", "target_new": "b"}]
        )


@pytest.mark.parametrize(
    ("method", "changes", "error", "message"),
    [
        ("ROM", {}, MethodError, r"Unknown EasyEdit method 'ROM'\. Did you mean 'ROME'"),
        ("FT-L", {"alg_name": "FT-L"}, HyperParamsError, "FT-L needs alg_name 'FT'; found 'FT-L'"),
        ("FT", {"batch_size": 0}, HyperParamsError, "batch_size must be a whole number from 1; found 0"),
        ("FT", {"batch_size": "4"}, HyperParamsError, "batch_size must be a whole number"),
        ("FT", {"layers": 3}, HyperParamsError, "layers must be a list"),
        ("FT", {"layers": [-1]}, HyperParamsError, "layers must be a list"),
    ],
)
def test_unusable_settings(method: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    values = read_yaml("FT/factworld") | changes
    with pytest.raises(error, match=message):
        BaselineHyperParams(method, values)


def test_overrides_count_where_the_file_has_the_key(tmp_path: Path) -> None:
    (tmp_path / "ft.yaml").write_text("alg_name: FT\nlayers: [1]\nlr: 1e-3\nmodel_name: x\n")
    found = BaselineHyperParams.read("FT", tmp_path / "ft.yaml", {"model_name": "y", "stats_dir": "z"})
    assert found.values == {"alg_name": "FT", "layers": [1], "lr": 1e-3, "model_name": "y"}
    assert found.to_dict() == found.values
    assert found.alg_name == "FT"


SHIPPED = sorted(path for method in HOST_METHODS for path in (hparams_folder() / method).glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_files_are_read_by_easyedit_as_by_us(path: Path, host: ModuleType) -> None:
    ours = BaselineHyperParams.read(path.parent.name, path)
    theirs = asdict(getattr(host, CLASSES[ours.values["alg_name"]]).from_hparams(str(path)))
    assert {name: theirs[name] for name in ours.values} == ours.values
    BaselineEditor(ours)


def test_all_methods_ship_for_all_models() -> None:
    assert len(SHIPPED) == 4 * len(HOST_METHODS) - 1  # WISE can't edit GPT-OSS, whose o_proj has a bias
