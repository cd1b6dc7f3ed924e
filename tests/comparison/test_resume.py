"""A comparison that is interrupted goes on, with the results that it would have had."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import assert_same_state, state_of
from tiny_comparison import METHODS, run_compare, tiny_hparams

from easyedit_moe.comparison import compare as comparing
from easyedit_moe.comparison.compare import compare
from easyedit_moe.comparison.rows import Row
from easyedit_moe.comparison.saved import earlier_rows, row_of, save_rows
from easyedit_moe.comparison.task import Task
from easyedit_moe.editors.global_speedup import GlobalSpeedupEditor
from easyedit_moe.editors.moeedit import MoEEditEditor
from easyedit_moe.errors import DataError
from easyedit_moe.hparams import hyperparams_class
from easyedit_moe.storage.strict_json import json_text


def settings(folder: Path, **changes: Any) -> list[Any]:
    return [hyperparams_class(m).from_dict(tiny_hparams(folder, m, **changes)) for m in METHODS]


def results(rows: Any) -> list[dict[str, Any]]:
    """What does not depend on how long it took."""
    return [{k: v for k, v in row.to_dict().items() if k not in ("seconds", "peak_memory_bytes")} for row in rows]


def test_rows_come_back_as_they_were(task: Task, tmp_path: Path) -> None:
    records = tuple(type(r)(r.request, r.paraphrases, ()) for r in task.records)  # no neighbours: scores of NaN
    made = compare(replace(task, records=records), settings(tmp_path)[:1], progress=False)
    save_rows(made, tmp_path / "out")
    read = earlier_rows(tmp_path / "out", task.provenance, ["MoTE"])
    assert [json_text(row.to_dict()) for row in read] == [json_text(row.to_dict()) for row in made.rows]
    assert math.isnan(read[0].scores.specificity.mean)
    assert read[1].routing == made.rows[1].routing
    assert row_of(made.rows[1].to_dict(), "counterfact").scores.efficacy == made.rows[1].scores.efficacy


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_it_goes_on_after_the_row_before(
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interruption: type[BaseException],
) -> None:
    whole = compare(task, settings(tmp_path), progress=False)
    out = tmp_path / "out"
    before = state_of(task.model)
    with monkeypatch.context() as patch:

        def solve(self: Any, *args: Any) -> None:
            raise interruption

        patch.setattr(MoEEditEditor, "solve", solve)
        with pytest.raises(interruption):
            compare(task, settings(tmp_path), save=lambda so_far: save_rows(so_far, out), progress=False)
    assert_same_state(before, state_of(task.model))
    saved = json.loads((out / "results.json").read_text())
    assert saved["state"] == "interrupted"
    assert [row["method"] for row in saved["rows"]] == ["pre-edit", "MoTE"]
    earlier = earlier_rows(out, task.provenance, METHODS)
    made: list[str] = []
    rest = compare(
        task, settings(tmp_path), lambda row: made.append(row.method), earlier=earlier,
        save=lambda so_far: save_rows(so_far, out), progress=False,
    )  # fmt: skip
    assert made == ["MoEEdit-BCD", "Global+speedup"]
    assert results(rest.rows) == results(whole.rows), "targets that were shared before are found again"
    assert (rest.complete, rest.provenance) == (True, whole.provenance)
    assert rest.rows[:2] == tuple(earlier)
    assert json.loads((out / "results.json").read_text())["state"] == "complete"


def test_a_row_in_the_middle_is_made_and_later_ones_are_never_lost(
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = compare(task, settings(tmp_path), progress=False)
    earlier = [row for row in whole.rows if row.method != "MoEEdit-BCD"]
    seen = []
    again = compare(task, settings(tmp_path), earlier=earlier, save=seen.append, progress=False)
    assert [row.method for row in seen[0].rows] == ["pre-edit", *METHODS]
    assert results(again.rows) == results(whole.rows)


def test_only_equal_settings_are_taken_over(task: Task, tmp_path: Path) -> None:
    whole = compare(task, settings(tmp_path), progress=False)
    made: list[str] = []
    changed = [*settings(tmp_path)[:2], settings(tmp_path, lambda_reg=9.0)[2]]
    again = compare(task, changed, lambda row: made.append(row.method), earlier=whole.rows, progress=False)
    assert made == ["Global+speedup"]
    assert again.rows[3].hparams["lambda_reg"] == 9.0
    theirs: list[Row] = [replace(row, easyedit={}) for row in whole.rows]
    made.clear()
    compare(task, settings(tmp_path)[:1], lambda row: made.append(row.method), earlier=theirs, progress=False)
    assert made == ["pre-edit", "MoTE"], "rows of other protocols are made again"


def test_nothing_is_computed_when_nothing_is_missing(
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = compare(task, settings(tmp_path), progress=False)
    monkeypatch.setattr(comparing, "routing_snapshot", None)
    assert compare(task, settings(tmp_path), earlier=whole.rows, progress=False) == whole


def test_other_data_is_refused(task: Task, tmp_path: Path) -> None:
    save_rows(compare(task, [], progress=False), tmp_path)
    assert earlier_rows(tmp_path / "nothing there", task.provenance, METHODS) == []
    with pytest.raises(DataError, match="edits: 4 there, 9 now"):
        earlier_rows(tmp_path, {**task.provenance, "edits": 9}, METHODS)
    (tmp_path / "results.json").write_text('{"rows": []}')
    with pytest.raises(DataError, match="is no result of compare"):
        earlier_rows(tmp_path, task.provenance, METHODS)
    (tmp_path / "results.json").write_text('{"rows": [')
    with pytest.raises(DataError, match="can't be read"):
        earlier_rows(tmp_path, task.provenance, METHODS)


# ---------------------------------------------------------------- the command


def rows_of(out: Path) -> list[str]:
    return [row["method"] for row in json.loads((out / "results.json").read_text())["rows"]]


def test_command_keeps_rows_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_compare(folder, "--methods", ",".join(METHODS), "--out", str(folder / "whole"))
    assert whole.exit_code == 0, whole.output

    def stop(self: Any, *args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GlobalSpeedupEditor, "solve", stop)
        done = run_compare(folder, "--methods", ",".join(METHODS))
    assert done.exit_code == 130
    assert "--resume" in done.stderr
    assert "Traceback" not in done.output
    assert rows_of(folder / "out") == ["pre-edit", *METHODS[:2]]
    assert not (folder / "out" / "table.md").exists()
    lost = run_compare(folder, "--methods", METHODS[0], "--resume")
    assert lost.exit_code == 2
    assert "would be lost: MoEEdit-BCD" in lost.stderr
    other = run_compare(folder, "--methods", ",".join(METHODS), "--resume", "--edits", "2")
    assert other.exit_code == 2
    assert "edits: 4 there, 2 now" in other.stderr
    done = run_compare(folder, "--methods", ",".join(METHODS), "--resume")
    assert done.exit_code == 0, done.output
    found, wanted = (json.loads((folder / name / "results.json").read_text()) for name in ("out", "whole"))
    for saved in (found, wanted):
        del saved["digest"]  # of seconds, too
        for row in saved["rows"]:
            del row["seconds"], row["peak_memory_bytes"]
    assert found == wanted


def test_an_override_goes_to_methods_that_have_it(folder: Path) -> None:
    (folder / "hparams" / "MoE-FT").mkdir()
    values = {"alg_name": "MoE-FT", "model_name": "tiny", "layers": [1], "dtype": "float32", "num_steps": 1}
    (folder / "hparams" / "MoE-FT" / "tiny.yml").write_text(yaml.safe_dump(values))
    done = run_compare(folder, "--methods", "MoTE,MoE-FT", "--stats-dir", str(folder / "elsewhere"))
    assert done.exit_code == 0, done.output
    rows = json.loads((folder / "out" / "results.json").read_text())["rows"]
    assert rows[1]["hparams"]["stats_dir"] == str(folder / "elsewhere")
    assert "stats_dir" not in rows[2]["hparams"]


def test_one_file_is_for_its_own_method(folder: Path) -> None:
    file = folder / "hparams" / "Global+speedup" / "tiny.yaml"
    done = run_compare(folder, "--hparams", str(file))
    assert done.exit_code == 0, done.output
    assert rows_of(folder / "out") == ["pre-edit", "Global+speedup"]
    for methods in ("Global+speedup,Global", "MoTE", "FT"):
        refused = run_compare(folder, "--hparams", str(file), "--methods", methods, "--out", str(folder / "none"))
        assert refused.exit_code == 2
        assert "holds hparams of Global+speedup, not of" in refused.stderr
        assert not (folder / "none").exists()
