"""The benchmark suite in its reduced mode: it runs, its contenders agree, and its results land on disk."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from benchmarks import (
    cores,
    dense_bcd,
    end_to_end,
    endurance,
    figure,
    growth,
    harness,
    held,
    peak,
    prepare,
    registry,
    shapes,
    solvers,
)
from benchmarks.__main__ import main
from benchmarks.allocations import stage, tracked
from easyedit_moe.algebra.bcd import expert_orders, solve_bcd
from easyedit_moe.algebra.metric import IdentityMetric

app = Typer()
app.command()(main)


def rows_of(path: Path, suite: str) -> list[dict[str, Any]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["schema"] == 1
    return content["suites"][suite]["rows"]


def test_the_reduced_mode_writes_a_table_and_json(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["solvers", "--quick", "--device", "cpu", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-quick.json")
    assert "write-back" in done.output
    rows = rows_of(path, "solvers")
    assert {row["benchmark"] for row in rows} == {"tucker basis", "solvers", "write-back"}
    solved = {(row["tokens"], row["solver"]): row for row in rows if row["benchmark"] == "solvers"}
    naive, ours = solved[6, "naive BCD, 4 passes"], solved[6, "BCD, 4 passes"]
    assert naive["difference to our BCD"] < 1e-5
    assert naive["objective"] == pytest.approx(ours["objective"], rel=1e-4)
    assert solved[6, "exact"]["objective"] < ours["objective"]
    assert all(row["seconds"] > 0 and row["least"] <= row["seconds"] <= row["most"] for row in solved.values())


def test_other_suites_results_stay(tmp_path: Path) -> None:
    one, two = [{"benchmark": "a", "seconds": 1.0}], [{"benchmark": "b", "seconds": 2.0}]
    path = harness.write_results(tmp_path, False, {"first": one})
    assert harness.write_results(tmp_path, False, {"second": two}) == path
    assert (rows_of(path, "first"), rows_of(path, "second")) == (one, two)
    harness.write_results(tmp_path, False, {"first": two})
    assert rows_of(path, "first") == two
    # Reduced runs never mix with real ones.
    assert harness.write_results(tmp_path, True, {"first": one}) != path


def test_results_describe_the_machine_and_name_no_host(tmp_path: Path) -> None:
    path = harness.write_results(tmp_path, False, {"first": []})
    about = json.loads(path.read_text(encoding="utf-8"))["suites"]["first"]["machine"]
    assert {"cpu", "cores", "threads", "torch"} <= set(about)
    assert about["threads"] == torch.get_num_threads()
    source = json.loads(path.read_text(encoding="utf-8"))["suites"]["first"]["source"]
    assert source["easyedit_moe"] == about["easyedit_moe"]
    assert source["commit"] is None or len(source["commit"]) == 40
    told = {"easyedit_moe": "9", "commit": "a" * 40, "changed": False, "date": "2026-01-01"}
    harness.write_results(tmp_path, False, {"first": []}, told)
    assert json.loads(path.read_text(encoding="utf-8"))["suites"]["first"]["source"] == told
    if len(platform.node()) > 3:
        assert platform.node() not in path.read_text(encoding="utf-8") + path.name


def test_contenders_take_turns() -> None:
    turns: list[str] = []
    times = harness.interleaved(
        {name: lambda name=name: turns.append(name) for name in ("a", "b", "slow")}, repeats=3, once=["slow"]
    )
    assert turns == ["a", "b", "a", "b", "slow", "a", "b", "a", "b"]
    assert [times[name]["runs"] for name in ("a", "b", "slow")] == [3, 3, 1]


@pytest.mark.parametrize("tokens", [1, 9])
def test_the_naive_bcd_is_ours_to_rounding(tokens: int) -> None:
    shape = shapes.QUICK
    keys, residual = shapes.random_keys(shape, tokens), shapes.random_residual(shape, tokens)
    orders = expert_orders(shape.experts, 4)
    dense = solvers.naive_bcd(keys, residual, 1.0, shape.experts, orders)
    update, report = solve_bcd(keys, residual, 1.0, IdentityMetric(), orders)
    assert solvers.relative_difference(dense, update) < 1e-5
    assert solvers.relative_difference(dense * 1.01, update) == pytest.approx(0.01, rel=1e-2)
    assert solvers.dense_objective(keys, residual, 1.0, dense) == pytest.approx(report.objective[-1], rel=1e-4)


def test_random_keys_have_the_true_sparsity() -> None:
    shape = shapes.MODELS["gpt-oss-20b"]
    keys = shapes.random_keys(shapes.ModelShape("s", 32, 4, 8, 6, (1, 1, 1), (0,), 1), 200)
    assert keys.expert.shape == (200, shape.active)
    assert all(len(set(row)) == 4 for row in keys.expert.tolist())
    torch.testing.assert_close(keys.gate.sum(1), torch.ones(200))


def test_end_to_end_in_reduced_mode() -> None:
    options = end_to_end.Options(methods="Global,MoEEdit-BCD", methods_with_targets="MoTE", quick=True)
    rows = end_to_end.run(options)
    assert [(row["method"], row["z"]) for row in rows] == [
        ("Global", "ready"), ("MoEEdit-BCD", "ready"), ("MoTE", "included"),
    ]  # fmt: skip
    for row in rows:
        assert row["solve"] > 0
        assert row["write"] > 0
        assert (row["targets"] > 0) == (row["z"] == "included")
        assert row["planned"] > 0
        assert row["peak bytes beyond before"] > 0
        assert not any("H200" in column for column in row), "a paper's figures are of another shape"


def test_requests_are_all_different() -> None:
    facts = end_to_end.requests(1000)
    assert len({fact.prompt for fact in facts}) == 1000
    assert all(fact.subject in fact.prompt for fact in facts)


@pytest.fixture(scope="module")
def grown() -> list[dict[str, Any]]:
    return growth.run(growth.Options(quick=True))


def test_growth_in_reduced_mode(grown: list[dict[str, Any]]) -> None:
    rows = grown
    assert {row["benchmark"] for row in rows} == {
        "growth with E", "growth with T", "growth with edits made", "growth with layers",
    }  # fmt: skip
    assert {row["what"] for row in rows} == {"exact", "BCD, 4 passes", "MoTE", "write", "Global"}
    made = [row for row in rows if row["benchmark"] == "growth with edits made"]
    ways = [(row["what"], row["metric"], row["made before"], row["way"]) for row in made]
    assert len(set(ways)) == len(ways) == 2 * 5 * 2
    by = dict(zip(ways, made, strict=True))
    unknowns = 8 * growth.QUICK.d_hidden // 16
    few = by["BCD, 4 passes", "identity", 40, held.HELD]
    many = by["BCD, 4 passes", "null space", 40, held.HELD]
    assert (few["form"], many["form"]) == ("growing columns", f"{unknowns} unknowns")
    assert by["exact", "identity", 40, held.HELD]["form"] == "40 held tokens"
    assert by["exact", "null space", 40, held.HELD]["form"] == f"{unknowns} unknowns"
    # Both ways make the same update.
    assert all(row["difference"] < 1e-5 for row in made if row["way"] == held.HELD)


def test_cores_hold_less_than_the_factors_of_every_expert() -> None:
    rows = cores.run(cores.Options(quick=True))
    for batches in (1, 3):
        own, others = (row for row in rows if row["batches"] == batches)
        assert (own["what"], others["what"]) == ("cores", "every expert's factors")
        assert own["held bytes"] < others["held bytes"] / 5
        assert own["file bytes"] <= others["file bytes"] + 200


def test_every_peak_is_of_what_was_allocated(grown: list[dict[str, Any]]) -> None:
    assert all(row["peak bytes"] > 0 for row in grown if "peak bytes" in row)


def test_blocks_are_counted_by_the_stage_that_made_them() -> None:
    def run() -> list[torch.Tensor]:
        with stage("first"):
            kept = torch.zeros(1000)
            kept.clone().add_(1)
        with stage("second"):
            weight = torch.nn.Parameter(kept + 1)
            (weight * weight).sum().backward()
        return [kept, weight]

    found, _ = tracked(run)
    assert 8000 <= found.peaks["first"] < 8100
    assert 12000 <= found.left < 12100
    assert 12000 <= found.peaks["second"] < 24000
    assert found.peak == pytest.approx(4000 + found.peaks["second"], rel=0.01)


def test_dense_updates_with_a_running_residual_are_ours_to_rounding() -> None:
    rows = {row["way"]: row for row in dense_bcd.run(dense_bcd.Options(quick=True))}
    assert list(rows) == [dense_bcd.OURS, dense_bcd.WRITTEN, dense_bcd.RUNNING, dense_bcd.ANEW]
    assert all(row["difference to ours"] < 1e-5 for row in list(rows.values())[1:])


def test_the_figure_compares_bcd_with_the_running_residual_first() -> None:
    ways = {dense_bcd.OURS: 1.0, dense_bcd.WRITTEN: 2.0, dense_bcd.RUNNING: 5.0}
    dense = [{"way": way, "seconds": seconds, "model": "m"} for way, seconds in ways.items()]
    naive = {"solver": "naive BCD, 4 passes", "model": "m", "tokens": 50, "seconds": 90.0}
    bars = figure.bcd_bars(dense, [naive, naive | {"model": "n"}, {"solver": "exact", "model": "m", "tokens": 50}])
    assert [seconds for _, seconds, _ in bars] == [1.0, 2.0, 5.0, 90.0]
    assert "another run" in bars[-1][0]
    both = figure.bcd_bars([*dense, {"way": dense_bcd.ANEW, "seconds": 80.0, "model": "m"}], [naive])
    assert [seconds for _, seconds, _ in both] == [1.0, 2.0, 5.0, 80.0]
    assert "another run" not in both[-1][0]


def test_what_is_cached_is_read_whole() -> None:
    rows = {row["what"]: row for row in prepare.run(prepare.Options(quick=True))}
    shape = shapes.QUICK
    moments = 4 * (shape.experts * shape.d_hidden**2 + shape.d_model**2)
    spaces = 8 * shape.experts * shape.d_hidden * (shape.d_hidden // 2)
    assert rows["moments"]["bytes"] >= len(shape.layers) * moments
    assert rows["null spaces"]["bytes"] >= len(shape.layers) * spaces
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows["corpus, read anew"]["bytes"] > 100 * rows["corpus, found by its record"]["bytes"]
    assert rows["corpus, found by its record"]["layers"] == 1


def test_the_peak_of_a_long_run_is_planned_and_measured() -> None:
    rows = peak.run(peak.Options(quick=True))
    plans = [row for row in rows if row["benchmark"] == "peak by plan"]
    assert [row["method"] for row in plans] == ["Global", "MoTE", "MoE-FT-L"]
    for row in plans:
        assert 60e9 < row["model bytes"] < 62e9
        assert row["beyond the model"] == pytest.approx((row["peak / model"] - 1) * row["model bytes"])
        assert 1 < row["z ready, edits alone / model"] <= row["peak / model"]
        assert row["fits"] == (row["within the room / model"] <= 1.1)
    found = [row for row in rows if row["benchmark"] == "peak measured"]
    assert [row["widths divided by"] for row in found] == [32, 16, 8]
    for row in found:
        assert row["beyond the model"] == max(row["peak of preparing"], row["prepared"] + row["peak of edits"]) > 0
        assert row["peak / model"] > row["peak / model of 48 layers"] > 1
    (full,) = [row for row in rows if row["benchmark"] == peak.AT_FULL]
    for row in found:
        share = 1 / row["widths divided by"]
        at = full["fixed bytes"] + full["bytes by the widths"] * share + full["bytes by their square"] * share**2
        editing = row["prepared"] + row["peak of edits"]
        assert at == pytest.approx(row["peak of preparing"] if full["largest"] == "preparing" else editing)


def test_a_run_that_needs_too_much_is_fitted_to_the_room() -> None:
    row = peak.planned("Global", 1000, 50)
    assert row["largest stage"] == "targets"
    assert row["peak / model"] > 1.1
    assert row["fits"]
    assert row["target_batch_size"] < 256
    assert row["z ready, edits alone / model"] < 1.1


def test_unknown_suites_are_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["solver", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_registered_suites_take_the_options_they_know(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(solvers, "run", lambda options: seen.append(options) or [])
    registry.SUITES["solvers"].run(quick=True, device="cpu")
    assert seen == [solvers.Options(quick=True, device="cpu")]
    assert not registry.Suite("benchmarks.nowhere").available


def test_hundreds_of_edits_and_the_way_back() -> None:
    rows = endurance.run(endurance.Options(quick=True))
    for benchmark in ("edits one by one", "batches of edits"):
        *done, undone = [row for row in rows if row["benchmark"] == benchmark]
        assert [row["made"] for row in done] == ([2, 4, 6] if undone["size"] == 1 else [1, 2, 3])
        assert undone["as before"]
        assert len({row["disk bytes"] for row in (*done, undone)}) == 1, "edits write nothing to the disk"
        assert all(row["seconds"] > 0 and row["remember_edits"] for row in (*done, undone))
    (asked,) = [row for row in rows if row["benchmark"] == "first and last edits"]
    assert (asked["what"], asked["part"], asked["edits"]) == ("MoTE", 2, 6)


def test_every_method_with_and_without_memory_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(_: endurance.Options, series: endurance.Series) -> list[dict[str, Any]]:
        about = {"benchmark": series.benchmark, "device": "cpu", "what": series.method}
        made = [(50, 0.2, 7), (series.count, 0.3, 8), (0, 0.1, 9)]
        return [
            about | {"remember_edits": series.remember, "made": n, "seconds": s, "resident bytes": size}
            for n, s, size in made
        ]

    monkeypatch.setattr(endurance, "_apart", parts)
    rows = endurance.run(endurance.Options())
    asked = [row for row in rows if row["benchmark"] == "first and last edits"]
    methods = ("Global", "MoTE", "MoEEdit-BCD")
    assert [(r["what"], r["remember_edits"]) for r in asked] == [
        (m, memory) for m in methods for memory in (False, True)
    ]
    for row in asked:
        assert (row["part"], row["seconds of the first"], row["resident bytes after the first"]) == (50, 0.2, 7)
        assert (row["edits"], row["seconds of the last"], row["resident bytes after the last"]) == (500, 0.3, 8)
