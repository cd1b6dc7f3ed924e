"""``locate`` as a whole: what it measures, that it goes on where it stopped, and that it agrees with ``compare``."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tiny import assert_same_state, chat_tokenizer, shared_model, state_of, tiny_model, tiny_tokenizer
from tiny_comparison import tiny_hparams, tiny_records
from torch import nn
from typer.testing import CliRunner

from easyedit_moe.commands.app import app
from easyedit_moe.commands.locate import whole_numbers
from easyedit_moe.comparison.compare import compare
from easyedit_moe.comparison.settings import resolve_hparams
from easyedit_moe.comparison.task import Task, load_task
from easyedit_moe.editors.proposing import propose
from easyedit_moe.errors import DataError, HyperParamsError, LayerError
from easyedit_moe.facts.records import parse_records
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.hparams import GlobalHyperParams
from easyedit_moe.localisation.tracing import TraceSettings
from easyedit_moe.workflow import locate as module
from easyedit_moe.workflow.locate import Location, locate
from easyedit_moe.workflow.locate_cost import costs
from easyedit_moe.workflow.locate_report import (
    LAYER_COLUMNS,
    cost_line,
    duration,
    expert_cells,
    layer_cells,
    markdown,
    trial_cells,
    tried,
    verdict,
    write_location,
)
from easyedit_moe.workflow.locate_saved import Measured
from easyedit_moe.workflow.locate_settings import STAGES, LocateSettings, windows_to_try

RECORDS = parse_records(tiny_records()).records
FEW = TraceSettings(samples=2)
DOCS = Path(__file__).parents[2] / "docs"


def settings(**changes: Any) -> LocateSettings:
    return LocateSettings(**{"batch_size": 2, "widths": (1, 2), "tracing": FEW, **changes})


def hparams(folder: Path, **changes: Any) -> GlobalHyperParams:
    return GlobalHyperParams.from_dict(tiny_hparams(folder, "Global", **changes), "here")


def located(folder: Path, model: nn.Module | None = None, **changes: Any) -> Location:
    kept = {name: changes.pop(name) for name in ("resume", "measure", "out", "on_cost") if name in changes}
    loaded = (model or shared_model(), tiny_tokenizer())
    return locate(RECORDS, loaded, hparams=hparams(folder), settings=settings(**changes), progress=False, **kept)


def _close(one: dict[str, float], other: dict[str, float]) -> bool:
    return one["mean"] - other["mean"] <= (one["stderr"] ** 2 + other["stderr"] ** 2) ** 0.5


def test_everything_is_measured_and_the_model_is_as_before(tmp_path: Path) -> None:
    model = tiny_model()
    before = state_of(model)
    told: list[Any] = []
    found = located(tmp_path, model, out=tmp_path / "out", on_cost=told.append, widths=(2,), edits=3)
    assert_same_state(before, state_of(model))
    rows = found.measured.rows
    for stage in ("routing", "tracing", "reachability", "experts"):
        assert [row["layer"] for row in rows[stage].values()] == [0, 1, 2, 3]
    assert set(rows["trial"]) == {"pre-edit", "0-1", "1-2", "2-3"}
    assert found.measured.complete
    assert [(one.stage, one.units) for one in told[0]] == [
        ("routing", 1), ("tracing", 4), ("reachability", 4), ("statistics", 1), ("trial", 3), ("experts", 4),
    ]  # fmt: skip
    assert all(one.seconds > 0 for one in told[0])
    paths = write_location(found, tmp_path / "out")
    assert [path.name for path in paths] == ["results.json", "table.md", "locate.png"]
    assert all(path.stat().st_size > 500 for path in paths)
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["state"] == "complete"
    assert set(saved["seconds"]) == set(STAGES)
    assert Measured.read(paths[0]).rows == rows
    cells = layer_cells(found)
    unknown = LAYER_COLUMNS.index("neighbours")  # whose subject stands nowhere in these records
    assert all(len(row) == len(LAYER_COLUMNS) for row in cells)
    assert all((text == "-") == (place == unknown) for row in cells for place, text in enumerate(row))
    assert len(trial_cells(found)) == 4
    assert 1 <= len(expert_cells(found)) <= 10
    best = tried(rows["trial"])[0]
    assert best["utility"]["mean"] == max(r["utility"]["mean"] for n, r in rows["trial"].items() if n != "pre-edit")
    assert f"Best window: layers {best['name']}," in verdict(found)[0]
    close = [r["name"] for r in tried(rows["trial"])[1:] if _close(best["utility"], r["utility"])]
    assert (f"its standard error): {', '.join(close)}." in verdict(found)[0]) == bool(close)
    assert all(" | ".join(row) in markdown(found) for row in cells)


def test_the_trial_is_what_compare_says(tmp_path: Path) -> None:
    model, tok = tiny_model(), tiny_tokenizer()
    found = located(
        tmp_path, model, stages=("reachability", "trial"), layers=(0, 1, 2), windows=5, edits=2, batch_size=1
    )
    for window in ([1, 2], [0]):
        hp = hparams(tmp_path, layers=window)
        before, row = compare(Task(model, tok, RECORDS[:2], "counterfact", 1, {}), [hp], progress=False).rows
        name = "1-2" if len(window) > 1 else "0"
        for mine, theirs in (
            (found.measured.rows["trial"][name], row),
            (found.measured.rows["trial"]["pre-edit"], before),
        ):
            theirs = json.loads(json.dumps(theirs.to_dict()))
            for key in ("efficacy", "generalisation", "specificity", "utility", "exact_match", "targets_reached"):
                assert mine[key] == theirs[key], key
            assert mine["hparams"] == theirs["hparams"]


def test_it_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"widths": (1,), "windows": 1, "edits": 2}
    whole = located(tmp_path, out=tmp_path / "whole", **few)
    asked: list[int] = []
    real = module.reachability

    def watched(search: Any, *more: Any) -> Any:
        asked.append(search.layer)
        if asked == [0, 1]:
            raise KeyboardInterrupt
        return real(search, *more)

    monkeypatch.setattr(module, "reachability", watched)
    with pytest.raises(KeyboardInterrupt):
        located(tmp_path, out=tmp_path / "out", **few)
    half = Measured.read(tmp_path / "out" / "results.json")
    assert half.seconds.keys() == {"routing", "tracing", "reachability"}
    assert [*half.rows["reachability"]] == ["0"]
    assert half.left == {"reachability": 3, "statistics": 1, "trial": 1, "experts": 4}
    told: list[Any] = []
    found = located(tmp_path, out=tmp_path / "out", resume=True, on_cost=told.append, **few)
    assert asked == [0, 1, 1, 2, 3]
    assert [one.stage for one in told[0]] == ["reachability", "statistics", "trial", "experts"]
    assert found.measured.complete
    for stage in ("routing", "tracing", "reachability", "experts"):
        assert found.measured.rows[stage] == whole.measured.rows[stage], stage
    for name, row in whole.measured.rows["trial"].items():
        assert found.measured.rows["trial"][name]["utility"] == row["utility"]
    again = located(tmp_path, out=tmp_path / "out", resume=True, on_cost=told.append, **few)
    assert told[1] == ()
    assert cost_line(told[1], None) == "Nothing is left to measure."
    assert again.measured.to_dict() == found.measured.to_dict()


def test_a_budget_bounds_what_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_expected", lambda job, stage, unit: {"reachability": 90.0}.get(stage, 0.0))
    found = located(tmp_path, out=tmp_path, budget=1.0, stages=("routing", "tracing", "reachability"))
    assert found.measured.left == {"routing": 0, "tracing": 0, "reachability": 4}
    assert "Not measured yet: 4 of reachability." in verdict(found)
    assert json.loads((tmp_path / "results.json").read_text())["state"] == "interrupted"
    done = located(tmp_path, out=tmp_path, budget=2.0, resume=True, stages=("routing", "tracing", "reachability"))
    assert done.measured.complete


def test_a_budget_counts_the_time_that_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(module, "_expected", lambda *_: 25.0)
    monkeypatch.setattr(module, "costs", lambda *_: [])
    found = located(tmp_path, stages=("tracing",), budget=2.0)  # a layer takes 25 s, and 25 s pass between two
    assert found.measured.left == {"tracing": 2}


def test_most_promising_windows_come_first(tmp_path: Path) -> None:
    found = located(tmp_path, stages=("reachability", "trial"), widths=(1,), edits=2)
    rows = found.measured.rows
    nll = {row["layer"]: row["paraphrase_nll"]["mean"] for row in rows["reachability"].values()}
    last = [row["layers"][-1] for name, row in rows["trial"].items() if name != "pre-edit"]
    assert last == sorted(last, key=nll.__getitem__)
    assert set(last) == {0, 1, 2, 3}


def test_the_hparams_own_window_comes_first_where_nothing_is_known(tmp_path: Path) -> None:
    found = located(tmp_path, stages=("trial",), edits=2)
    names = [name for name in found.measured.rows["trial"] if name != "pre-edit"]
    assert names == ["1-2", "2", "1", "0-1", "3", "2-3", "0"]


def test_windows_with_one_last_layer_share_a_search_in_the_estimate() -> None:
    class Load:
        def search(self, hparams: Any, layer: int) -> float:
            return 10.0 * (4 - layer)

        def trial(self, hparams: Any, window: tuple[int, ...], searched: bool) -> float:
            return len(window) + (0.0 if searched else self.search(hparams, window[-1]))

    todo = {"trial": [(0,), (1,), (0, 1), (2,), (1, 2)]}
    load: Any = Load()
    (own,) = costs(load, settings(stages=("trial",)), load, todo)
    assert (own.units, own.seconds) == (5, 7 + 40 + 30 + 20)
    (after,) = costs(load, settings(stages=("reachability", "trial")), load, todo)
    assert after.seconds == 7
    assert costs(load, settings(stages=("trial",)), load, {"trial": []}) == []


def test_only_an_estimate(tmp_path: Path) -> None:
    told: list[Any] = []
    found = located(tmp_path, measure=False, on_cost=told.append)
    assert not any(found.measured.rows.values())
    assert len(told[0]) == len(STAGES)
    assert "reachability" in cost_line(told[0], 5)
    assert "Budget: 5 min." in cost_line(told[0], 5)
    assert [duration(s) for s in (3, 120, 7200)] == ["3 s", "2.0 min", "2.0 h"]
    assert verdict(found)[0].startswith("No window was tried")


@pytest.mark.parametrize(
    "changes", [{"edits": 3}, {"layers": (0, 1)}, {"tracing": TraceSettings(samples=3)}, {"batch_size": 4}]
)
def test_other_settings_are_not_mixed(tmp_path: Path, changes: dict[str, Any]) -> None:
    located(tmp_path, out=tmp_path, stages=("routing",))
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(DataError, match="can't be gone on with"):
        located(tmp_path, out=tmp_path, resume=True, stages=("routing",), **changes)
    assert (tmp_path / "results.json").read_bytes() == before


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs the folder"):
        located(tmp_path, resume=True)
    with pytest.raises(DataError, match="must be of routing"):
        settings(stages=("everything",))
    with pytest.raises(DataError, match="at least 1"):
        settings(budget=0.0)
    with pytest.raises(LayerError, match="out of range"):
        located(tmp_path, layers=(1, 9))
    with pytest.raises(LayerError, match="1 to 4 layers"):
        located(tmp_path, widths=(5,))
    assert located(tmp_path, widths=(5,), stages=("routing",)).measured.complete
    with pytest.raises(DataError, match="7 were asked for"):
        located(tmp_path, edits=7)
    loaded = (shared_model(), tiny_tokenizer())
    with pytest.raises(DataError, match="no fact is left"):
        locate([EditRequest("It is cold in", None, "Rome")], loaded, hparams=hparams(tmp_path), settings=settings())
    with pytest.raises(HyperParamsError, match="site: shared_expert"):
        locate(RECORDS, (shared_model(), tiny_tokenizer()), hparams=hparams(tmp_path, site="shared_expert"))
    with pytest.raises(HyperParamsError, match="ROME has no target vectors"):
        locate(method="ROME")
    ft = resolve_hparams("MoE-FT", "factworld", None, {})
    with pytest.raises(HyperParamsError, match="no target vectors"):
        locate(RECORDS, loaded, hparams=ft)
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(DataError, match="no result of locate"):
        located(tmp_path, out=tmp_path, resume=True)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_model_without_hparams(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """Neutral facts, and hparams chosen from its config; dense layers are not measured."""
    layers = (0, 1, 2, 3) if family == "qwen3_moe" else (1, 2, 3)
    chosen = LocateSettings(edits=2, widths=(2,), windows=2, tracing=FEW)
    loaded = (tiny_model(family), tiny_tokenizer())
    with caplog.at_level(logging.WARNING):
        found = locate(
            model=loaded, settings=chosen, overrides={"v_num_grad_steps": 1, "metric": "identity"}, progress=False
        )
    assert "No hparams ship for" in caplog.text
    assert found.layers == layers
    assert found.measured.provenance["data"] == "neutral"
    chosen_layers = found.measured.provenance["hparams"]["layers"]
    assert chosen_layers == propose("m", "Global", None, False, loaded[0]).hparams({}).layers
    assert chosen_layers in [row["layers"] for row in found.measured.rows["trial"].values() if "layers" in row]
    assert found.measured.complete


def test_in_a_chat(tmp_path: Path) -> None:
    hp = hparams(tmp_path, chat=True)
    loaded = (shared_model(), chat_tokenizer())
    chosen = settings(stages=("routing", "tracing", "reachability"), layers=(1,), edits=2)
    found = locate(RECORDS, loaded, hparams=hp, settings=chosen)
    plain = located(tmp_path, stages=("reachability",), layers=(1,), edits=2)
    assert found.measured.complete
    mine, other = (f.measured.rows["reachability"]["1"]["initial_nll"]["mean"] for f in (found, plain))
    assert mine != pytest.approx(other, abs=1e-3)


def test_windows_to_try() -> None:
    assert windows_to_try(LocateSettings(), range(8), [0, 1, 2, 3])[-1] == (4, 5, 6, 7)
    found = windows_to_try(LocateSettings(windows=6), range(48), [3, 4, 5, 6, 7])
    assert (3, 4, 5, 6, 7) in found
    assert len(found) == 6
    assert {len(window) for window in windows_to_try(LocateSettings(), range(24), [3, 4, 5])} == {1, 2, 3}
    assert windows_to_try(LocateSettings(), [5], [0, 1]) == [(5,)]


def test_whole_numbers() -> None:
    assert whole_numbers("3-5,1 , 4") == (1, 3, 4, 5)
    assert whole_numbers("") == ()
    for text in ("a", "3-", "-3", "5-3", "1.5"):
        with pytest.raises(LayerError, match=r"whole numbers such as 3"):
            whole_numbers(text)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("tiny")
    tiny_tokenizer().save_pretrained("tiny")
    Path("data.json").write_text(json.dumps(tiny_records()), encoding="utf-8")
    line = [
        "locate",
        "data.json",
        "--model",
        "tiny",
        "--dtype",
        "float32",
        "--samples",
        "2",
        "--edits",
        "3",
        "--widths",
    ]
    line += ["1", "--layers", "1-2", "--set", "v_num_grad_steps=2", "--set", "metric=identity", "--out", "out"]
    asked = CliRunner().invoke(app, [*line, "--estimate"])
    assert asked.exit_code == 0, asked.output
    assert "Expected: about" in asked.output
    assert not Path("out").exists()
    part = CliRunner().invoke(app, ["-q", *line, "--measure", "routing,tracing", "--budget", "5", "--json"])
    assert part.exit_code == 0, part.output
    assert len(json.loads(part.stdout)["rows"]["tracing"]) == 2
    rest = CliRunner().invoke(app, [*line, "--resume"])
    assert rest.exit_code == 0, rest.output
    assert "Best window: layers" in rest.output
    assert "Written: " in rest.output
    assert {path.name for path in Path("out").iterdir()} >= {"results.json", "table.md", "locate.png"}
    wrong = CliRunner().invoke(app, [*line, "--resume", "--skip", "1"])
    assert wrong.exit_code == 2
    assert "can't be gone on with" in wrong.output


def test_the_bundled_model_is_edited_where_locate_says(tmp_path: Path) -> None:
    """Few facts, few windows: its YAML's own is the best, with the numbers that ``compare`` gives."""
    chosen = LocateSettings(edits=4, widths=(4,), windows=2, stages=("trial",))
    given = {"metric": "identity", "v_num_grad_steps": 15}
    found = locate(settings=chosen, overrides=given, progress=False)
    assert [*found.measured.rows["trial"]] == ["pre-edit", "0-3", "4-7"]
    assert verdict(found)[0].startswith("Best window: layers 0-3,")
    task = load_task("factworld", "factworld", 4, 200, 50, "float32", "cpu", progress=False)
    _, row = compare(task, [resolve_hparams("Global", "factworld", None, given)], progress=False).rows
    mine, theirs = found.measured.rows["trial"]["0-3"], json.loads(json.dumps(row.to_dict()))
    for key in ("efficacy", "generalisation", "specificity", "utility"):
        assert mine[key] == theirs[key]


def test_the_statistics_are_reckoned_unless_they_are_there(tmp_path: Path) -> None:
    told: list[Any] = []
    for _ in range(2):
        located(tmp_path, stages=("statistics",), on_cost=told.append)
    (first,), (second,) = told
    assert first.seconds > 0
    assert second.seconds == 0


def test_the_page_shows_the_committed_measurements() -> None:
    """docs/locate.md holds the tables of docs/locate.json, and its verdict."""
    found = Measured.read(DOCS / "locate.json")
    shown = Location(found, (), tuple(found.provenance["layers"]), ())
    page = (DOCS / "locate.md").read_text(encoding="utf-8")
    for row in (*layer_cells(shown), *trial_cells(shown)[:6], *expert_cells(shown)[:5]):
        assert f"| {' | '.join(row)} |" in page
    assert found.complete
    assert found.provenance["model"] == "factworld"
    (named,) = verdict(shown)
    assert named.startswith("Best window: layers 0-3,")
    assert named in page.replace("\n", " ")
