"""Settings tried on held-out records: what is tried, within which budget, and what must not be reported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from edited_folders import saved
from tiny import assert_same_state, state_of, tiny_model
from tiny_comparison import tiny_hparams, tiny_records
from typer.testing import CliRunner

from easyedit_moe.commands.app import app
from easyedit_moe.comparison.tuned import check_held_out, record_hash
from easyedit_moe.errors import CheckpointError, DataError, HyperParamsError, NumericalError
from easyedit_moe.facts.records import load_records
from easyedit_moe.hparams import hyperparams_class, load_hyperparams
from easyedit_moe.workflow import tune as tuning
from easyedit_moe.workflow.tune import axes, tune


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tune")
    saved(where / "tiny", tiny_model())
    (where / "data.json").write_text(json.dumps(tiny_records(4)))
    return where


def start(folder: Path, method: str = "Global", **changes: Any) -> Any:
    values = tiny_hparams(folder, method, model_name=str(folder / "tiny"), batch_size=2, **changes)
    return hyperparams_class(method).from_dict(values)


def run(folder: Path, hparams: Any, **options: Any) -> Any:
    options = {"edits": 2, "budget": 60, **options}
    return tune(str(folder / "data.json"), str(folder / "tiny"), "", hparams, progress=False, **options)


def test_axes_vary_what_the_method_leaves_open(folder: Path) -> None:
    found = axes(start(folder, lambda_reg=1.0), 8, range(8))
    assert list(found) == ["lambda_reg", "v_num_grad_steps", "v_lr", "clamp_norm_factor", "null space", "layers"]
    assert found["v_num_grad_steps"] == [{"v_num_grad_steps": 6}]
    assert found["layers"] == [{"layers": w} for w in ([0, 1], [2, 3], [2], [1])]
    assert found["lambda_reg"] == [{"lambda_reg": 0.1}, {"lambda_reg": 10.0}]
    assert {"metric": "identity"} in found["null space"]
    assert {"nullspace_threshold": 0.01, "nullspace_relative": True} in found["null space"]
    fixed = axes(start(folder, "MoE-AlphaEdit"), 8, range(8))
    assert {"metric": "identity"} not in fixed["null space"]
    assert "null space" not in axes(start(folder, "MoE-MEMIT"), 8, range(8))
    relative = axes(start(folder, nullspace_relative=True, nullspace_threshold=0.5), 8, range(8))["null space"]
    assert [one.get("nullspace_threshold") for one in relative] == [0.05, None]
    trains = axes(
        hyperparams_class("MoE-FT").from_dict({"alg_name": "MoE-FT", "model_name": "m", "layers": [1]}), 4, [1, 3]
    )
    assert trains == {"lr": [{"lr": 0.0003}, {"lr": 0.003}], "num_steps": [{"num_steps": 50}]}


@pytest.mark.parametrize(("rank", "tried"), [(0.4, [0.2, 0.6]), (0.75, [0.375, 0.875]), (1.0, [0.5]), (8, [4, 12])])
def test_a_smaller_and_a_larger_null_space_are_tried(rank: float, tried: list[float], folder: Path) -> None:
    found = axes(start(folder, nullspace_rank=rank), 8, range(8))["null space"]
    assert found == [*({"nullspace_rank": one} for one in tried), {"metric": "identity"}]


def test_windows_stay_among_the_moe_layers_below_the_last(folder: Path) -> None:
    windows = [one["layers"] for one in axes(start(folder, layers=[3, 5, 7]), 10, [1, 3, 5, 7, 9])["layers"]]
    assert windows == [[1, 3, 5], [5, 7], [3, 5]]
    assert axes(start(folder, layers=[1]), 2, [1]).get("layers") is None


def scripted(monkeypatch: pytest.MonkeyPatch, utilities: dict[str, float]) -> list[dict[str, Any]]:
    """Trials whose utility depends on their changes alone; the changes in the order in which they were tried."""
    seen: list[dict[str, Any]] = []

    def tried(self: Any, axis: str, changes: dict[str, Any], strict: bool = False) -> Any:
        seen.append(changes)
        value = 50 + sum(utilities.get(f"{name} {value}", -1) for name, value in changes.items())
        scores = {name: (float(value), 1.0) for name in ("efficacy", "generalisation", "specificity", "utility")}
        trial = tuning.Trial(axis, changes, scores, 0.0)
        self.trials.append(trial)
        self.unedited = ["x"]
        return trial

    monkeypatch.setattr(tuning._Search, "_tried", tried)
    monkeypatch.setattr(tuning, "_scores", lambda _: {"utility": (33.0, 0.0)})
    return seen


def test_each_axis_starts_from_the_best_so_far(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = scripted(monkeypatch, {"layers [0, 1]": 3, "lambda_reg 0.1": 2, "metric identity": 0})
    found = run(folder, start(folder))
    assert found.best.changes == {"layers": [0, 1], "lambda_reg": 0.1}
    assert found.hparams == start(folder, layers=[0, 1], lambda_reg=0.1), "an equal that came later is not taken"
    assert seen[0] == {}
    assert all(one["lambda_reg"] == 0.1 for one in seen if "layers" in one)
    assert found.left_out == ()


def test_real_trials_leave_the_model_as_it_was_and_stop_at_the_budget(folder: Path) -> None:
    told: list[Any] = []
    found = run(folder, start(folder), budget=1e-6, out=folder / "out", on_trial=told.append)
    assert [trial.axis for trial in told] == ["start"], "the first always runs"
    assert len(found.left_out) > 5
    assert all(math.isfinite(mean) for mean, _ in found.trials[0].scores.values())
    saved_file = json.loads((folder / "out" / "tuning.json").read_text())
    records = load_records(str(folder / "data.json")).records
    assert saved_file["records"] == [record_hash(record) for record in records[:2]]
    back = load_hyperparams(folder / "out" / "hparams.yaml")
    assert back == found.hparams


def test_trials_of_a_real_search(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[Any] = []
    monkeypatch.setattr(tuning, "axes", lambda *_: {"lambda_reg": [{"lambda_reg": 1e-4}], "layers": [{"layers": [9]}]})
    real = tuning.load_task

    def loaded(*arguments: Any) -> Any:
        task = real(*arguments)
        models.append((task.model, state_of(task.model)))
        return task

    monkeypatch.setattr(tuning, "load_task", loaded)
    found = run(folder, start(folder))
    ((model, before),) = models
    assert_same_state(before, state_of(model))
    assert [trial.axis for trial in found.trials] == ["start", "lambda_reg", "layers"]
    assert "out of range" in found.trials[2].error
    assert found.best is not found.trials[2]

    def failing(*arguments: Any, **options: Any) -> Any:
        raise NumericalError("x")

    monkeypatch.setattr(tuning, "compare", failing)
    with pytest.raises(NumericalError, match="x"):
        run(folder, start(folder))


def test_tuned_settings_are_not_scored_on_what_they_were_tuned_on(folder: Path, tmp_path: Path) -> None:
    run(folder, start(folder), budget=1e-6, out=tmp_path / "tuned")
    records = load_records(str(folder / "data.json")).records
    file = tmp_path / "tuned" / "hparams.yaml"
    check_held_out(file, records[2:])
    check_held_out(None, records)
    check_held_out(tmp_path, records)
    for path in (file, file.parent):
        with pytest.raises(DataError, match="2 of the 3 records were used to tune"):
            check_held_out(path, records[:3])
    common = ["compare", "--model", str(folder / "tiny"), "--data", str(folder / "data.json"), "--hparams", str(file)]
    refused = CliRunner().invoke(app, [*common, "--edits", "2", "--out", str(tmp_path / "a")])
    assert refused.exit_code == 2
    assert "were used to tune" in " ".join(refused.output.split())
    done = CliRunner().invoke(app, [*common, "--skip", "2", "--edits", "2", "--out", str(tmp_path / "b")])
    assert done.exit_code == 0, done.output
    (file.parent / "tuning.json").write_text("{}")
    with pytest.raises(DataError, match="does not say"):
        check_held_out(file, records)


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(HyperParamsError, match="budget"):
        run(folder, start(folder), budget=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(CheckpointError, match="full"):
        run(folder, start(folder), out=tmp_path / "full")


def test_the_command(folder: Path, tmp_path: Path) -> None:
    start(folder).to_yaml(tmp_path / "mine.yaml")
    done = CliRunner().invoke(
        app,
        ["tune", str(folder / "data.json"), "--model", str(folder / "tiny"), "--hparams", str(tmp_path / "mine.yaml"),
         "--edits", "2", "--budget", "0.000001", "--out", str(tmp_path / "out")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "unedited" in done.stdout
    assert "as it was" in done.stdout
    assert "settings untried" in done.stderr
    assert (tmp_path / "out" / "hparams.yaml").is_file()
