"""The memory planner: shapes without weights, chunk sizes that fit, and plans against measured peaks."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny import CONFIGS, TEXTS, tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from benchmarks.allocations import tracked
from benchmarks.plan import Size, measured
from easyedit_moe import factworld
from easyedit_moe.algebra.bcd import expert_orders, solve_bcd
from easyedit_moe.algebra.core import solve_mote
from easyedit_moe.algebra.exact import solve_exact
from easyedit_moe.algebra.metric import IdentityMetric
from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.algebra.tucker import TuckerBasis
from easyedit_moe.commands.app import app
from easyedit_moe.editors import make_editor, planner, stages
from easyedit_moe.editors.planner import MemoryPlan, plan
from easyedit_moe.errors import DataError, HyperParamsError, LayerError, LayoutError
from easyedit_moe.hparams import GlobalHyperParams, MoEEditHyperParams, MoTEHyperParams, SolverHyperParams
from easyedit_moe.moe import shapes
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.loading import empty_model
from easyedit_moe.moe.shapes import Shapes, shapes_of
from easyedit_moe.patches.groups import Scratch

QWEN = hf.Qwen3MoeConfig(
    vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
    head_dim=128, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
)  # fmt: skip
TINY = Size("tiny", 8, 2, 128, 64, 5, 4096, 8, "float32")
CLASSES: dict[str, type[SolverHyperParams]] = {
    "MoTE": MoTEHyperParams, "MoEEdit-BCD": MoEEditHyperParams, "Global": GlobalHyperParams,
}  # fmt: skip
methods = pytest.mark.parametrize("method", CLASSES)


def hparams(method: str, layers: list[int] | None = None, **values: Any) -> SolverHyperParams:
    layers = [3, 4, 5, 6, 7] if layers is None else layers
    return CLASSES[method](alg_name=method, model_name="m", layers=layers, **values)


@pytest.fixture(scope="module")
def qwen() -> Shapes:
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(QWEN, dtype=torch.bfloat16)
    return shapes_of(model, [3, 4, 5, 6, 7])


# ---------------------------------------------------------------- shapes


def test_the_real_shape_is_known_without_weights(qwen: Shapes) -> None:
    assert (qwen.experts, qwen.active, qwen.d_model, qwen.d_hidden) == (128, 8, 2048, 768)
    assert (qwen.num_layers, qwen.vocabulary, qwen.itemsize) == (48, 151936, 2)
    assert qwen.parameters == pytest.approx(61.1e9, rel=1e-2)  # 30.5 billion parameters in bfloat16


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3", "granitemoe", "qwen3_5_moe"])
def test_shapes_on_the_meta_device_are_those_of_the_model(family: str) -> None:
    real = tiny_model(family)
    with torch.device("meta"):
        empty = hf.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32)
    found = shapes_of(empty, [1, 2])
    assert found == shapes_of(real, [1, 2])
    layout = MoELayerView(real).layers[1].experts.layout
    assert (found.experts, found.d_model, found.d_hidden) == (layout.num_experts, layout.d_model, layout.d_hidden)
    with pytest.raises(LayoutError, match="meta device"):
        MoELayerView(empty).require([1, 2])


def test_layers_are_checked(qwen: Shapes) -> None:
    with pytest.raises(LayerError, match="out of range"):
        shapes_of(tiny_model(), [99])


def test_a_config_that_does_not_tell_the_experts_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_EXPERTS_PER_TOKEN", ("experts_a_token_likes",))
    with pytest.raises(LayoutError, match="experts per token"):
        shapes_of(tiny_model(), [1])


# ---------------------------------------------------------------- plans


@methods
def test_stages_of_a_plan(method: str, qwen: Shapes) -> None:
    found = plan(qwen, hparams(method))
    names = [stage.name for stage in found.stages]
    basis = ["basis"] if method == "MoTE" else []
    assert names == ["statistics", "metric", *basis, "targets", "capture", "solve", "write"]
    assert found.peak == max(found.peaks())
    assert min(found.peaks()) > qwen.parameters
    assert found.fits
    json.dumps(found.to_dict())
    # Originals in five layers of the experts that 50 facts reach, which MoTE's core all are.
    assert found.stages[-1].kept >= 5 * (128 if method == "MoTE" else 123) * 2048 * 768 * 2


def test_nothing_is_collected_for_plain_ridge(qwen: Shapes) -> None:
    found = plan(qwen, hparams("Global", metric="identity"))
    assert [stage.name for stage in found.stages] == ["targets", "capture", "solve", "write"]


def stage(found: MemoryPlan, name: str) -> int:
    return next(s.kept + s.working for s in found.stages if s.name == name)


@pytest.mark.parametrize("method", ["Global", "MoTE", "MoEEdit-BCD"])
def test_spreads_hold_what_they_solve_together(method: str, qwen: Shapes) -> None:
    """Once: keys and solutions of all layers, where update has one's. Last: metric, statistics, originals of one."""
    by = {how: plan(qwen, hparams(method, spread=how)) for how in ("residual", "update", "once", "last")}
    keys = 4 * 50 * 8 * 768  # of one layer
    assert stage(by["once"], "capture") - stage(by["update"], "capture") >= 4 * keys
    # The others hold one layer's solution while the next is found.
    solution = 8 * 50 * (2048 + 8 * (384 if method == "MoTE" else 768))
    assert stage(by["once"], "solve") - stage(by["residual"], "solve") >= 4 * solution
    assert by["last"].layers == by["residual"].layers[-1:]
    for name in ("metric", "write"):
        kept = {how: next(s.kept for s in found.stages if s.name == name) for how, found in by.items()}
        assert kept["residual"] == kept["once"] == 5 * kept["last"]


def test_ranks_that_only_the_weights_tell_are_planned_for_in_full(qwen: Shapes) -> None:
    energy = hparams("MoTE", tucker_energy=[0.9, 0.9, 0.9])
    full = hparams("MoTE", rank_expert=1.0, rank_out=1.0, rank_in=1.0)
    assert plan(qwen, energy).stages == plan(qwen, full).stages


@methods
def test_the_solvers_memory_grows_with_the_edits_that_are_solved_together(method: str, qwen: Shapes) -> None:
    needs = [stage(plan(qwen, hparams(method), edits=n), "solve") for n in (1, 50, 1000, 10_000)]
    assert needs == sorted(needs)
    remembering = hparams(method, remember_edits=True)
    assert stage(plan(qwen, remembering, edits=50, earlier_edits=950), "solve") == needs[2]
    assert stage(plan(qwen, hparams(method), edits=50, earlier_edits=950), "solve") == needs[1]
    three = hparams(method, context_prefixes=["a", "b"])
    assert stage(plan(qwen, three, edits=50), "solve") == stage(plan(qwen, hparams(method), edits=150), "solve")


def test_ten_thousand_edits_stay_below_the_size_of_the_model(qwen: Shapes) -> None:
    for method in CLASSES:
        assert stage(plan(qwen, hparams(method), edits=10_000), "solve") < 8e9
    assert stage(plan(qwen, hparams("Global"), edits=10_000), "solve") >= 8 * 10_000**2


@methods
def test_chunk_sizes_are_picked_to_fit_the_budget(method: str, qwen: Shapes) -> None:
    free = plan(qwen, hparams(method))
    tight = plan(qwen, hparams(method), budget=free.peak - 10**9)
    assert tight.fits
    assert tight.peak <= free.peak - 10**9
    assert any(tight.settings[name] < size for name, size in free.settings.items())
    generous = plan(qwen, hparams(method), budget=2 * free.peak)
    assert generous.settings == free.settings
    hopeless = plan(qwen, hparams(method), budget=qwen.parameters)
    assert not hopeless.fits
    assert set(hopeless.settings.values()) == {1}
    smaller = planner.with_settings(hparams(method), tight)
    assert smaller.target_batch_size == tight.settings["target_batch_size"]
    with pytest.raises(HyperParamsError, match="greater than 0"):
        plan(qwen, hparams(method), budget=0)


# ---------------------------------------------------------------- measured peaks

SHAPES = Shapes(16, 4, 256, 96, 1, 0, 0, 4)
RANKS = (8, 64, 32)


def problem(tokens: int) -> tuple[RoutedKeys, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    expert = torch.rand(tokens, SHAPES.experts, generator=draw).topk(SHAPES.active).indices
    gate = torch.rand(tokens, SHAPES.active, generator=draw)
    key = torch.randn(tokens, SHAPES.active, SHAPES.d_hidden, generator=draw)
    return RoutedKeys(expert, gate, key), torch.randn(tokens, SHAPES.d_model, generator=draw)


def random_basis() -> TuckerBasis:
    draw, sizes = torch.Generator().manual_seed(1), (SHAPES.experts, SHAPES.d_model, SHAPES.d_hidden)
    factors = [
        torch.linalg.qr(torch.randn(n, r, dtype=torch.float64, generator=draw)).Q
        for n, r in zip(sizes, RANKS, strict=True)
    ]
    return TuckerBasis(*factors, 0.0)


@pytest.mark.parametrize("tokens", [10, 100, 400, 2000])
@pytest.mark.parametrize("solver", ["exact", "bcd", "mote"])
def test_solvers_allocate_what_is_planned(solver: str, tokens: int) -> None:
    """Dual and primal forms, small and large systems, the row space of few and of many residuals."""
    metric, (keys, residual), basis = IdentityMetric(), problem(tokens), random_basis()
    orders = expert_orders(SHAPES.experts, 1)
    run, (planned, _) = {
        "exact": (lambda: solve_exact(keys, residual, 1.0, metric), stages.exact_bytes(SHAPES, tokens, "identity")),
        "bcd": (lambda: solve_bcd(keys, residual, 1.0, metric, orders), stages.bcd_bytes(SHAPES, tokens, "identity")),
        "mote": (
            lambda: solve_mote(keys, residual, 1.0, metric, basis),
            stages.mote_bytes(SHAPES, tokens, *RANKS),
        ),
    }[solver]
    found, _ = tracked(run)
    assert planned == pytest.approx(found.peak, rel=0.15)


MEASURED = ("MoTE", "MoEEdit-BCD", "Global", "MoE-MEMIT", "MoE-FT-L", "UnKE", "MEMoE")


@pytest.mark.parametrize(("method", "edits"), [*((method, 8) for method in MEASURED), ("MEMoE", 1)])
def test_every_stage_allocates_what_is_planned(method: str, edits: int, tmp_path: Path) -> None:
    tok = hf.AutoTokenizer.from_pretrained(str(factworld.model_path()))
    size = replace(TINY, edits=edits)
    rows = measured(size, method, size.model("cpu"), tok, tmp_path, "cpu")
    assert {"whole edit", "train" if method == "MEMoE" else "write"} < {row["stage"] for row in rows}
    ratios = {row["stage"]: row["planned / measured"] for row in rows}
    assert all(0.85 <= ratio <= 1.15 for ratio in ratios.values()), ratios


@pytest.mark.parametrize(("experts", "hit", "draws"), [(8, 3, 1), (8, 3, 20), (10, 6, 2), (6, 6, 3), (1, 1, 4)])
def test_the_longest_run_of_neighbours_is_a_median(experts: int, hit: int, draws: int) -> None:
    def longest(chosen: tuple[int, ...]) -> int:
        return max(len(list(run)) for _, run in groupby(enumerate(chosen), lambda one: one[1] - one[0]))

    runs = [longest(chosen) for chosen in combinations(range(experts), hit)]
    found = stages.longest_run(experts, hit, draws)
    assert (sum(run <= found for run in runs) / len(runs)) ** draws >= 0.5
    assert found == 1 or (sum(run < found for run in runs) / len(runs)) ** draws < 0.5


def test_a_write_holds_no_scratch_that_became_too_small() -> None:
    def write() -> None:
        scratch, like = Scratch(), torch.empty(0)
        scratch.take(like, 1, 1000)
        scratch.take(like, 3, 1000)

    found, _ = tracked(write)
    assert found.peak == 3 * 4000


# ---------------------------------------------------------------- the command


def test_the_command_prints_a_plan() -> None:
    done = CliRunner().invoke(app, ["plan", "--edits", "10", "--budget", "1"])
    assert done.exit_code == 0, done.output
    for name in ("model", "statistics", "basis", "targets", "solve", "write", "target_batch_size"):
        assert name in done.output
    assert CliRunner().invoke(app, ["plan", "--method", "Global", "--budget", "0.01"]).exit_code == 1
    assert CliRunner().invoke(app, ["plan", "--method", "Globel"]).exit_code == 2


def test_an_empty_model_has_no_weights() -> None:
    model = empty_model("factworld", "float32")
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(DataError, match="no-such-model"):
        empty_model("no-such-model")
    with pytest.raises(HyperParamsError, match="dtype"):
        empty_model("factworld", "float8")


def test_an_editor_logs_its_plan_before_it_collects_anything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(TEXTS), encoding="utf-8")
    hp = hparams("Global", [1], stats_dir=str(tmp_path), mom2_dataset=str(corpus), mom2_n_samples=8)
    with caplog.at_level(logging.INFO, logger="easyedit_moe"):
        make_editor(hp, progress=False).prepare(tiny_model(), tiny_tokenizer())
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0].startswith("planned memory in GB: model 0.0")
    assert all(name in messages[0] for name in ("statistics", "metric", "solve", "write"))
