from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import assert_same_state, state_of, tiny_model
from tiny_comparison import METHODS, run_compare, tiny_hparams, tiny_records
from typer.testing import CliRunner

from easyedit_moe.commands.app import app
from easyedit_moe.comparison import compare as comparing
from easyedit_moe.comparison import report
from easyedit_moe.comparison.compare import compare
from easyedit_moe.comparison.settings import ALL_METHODS, resolve_hparams
from easyedit_moe.comparison.task import Task, load_task
from easyedit_moe.editors import method_names, solving
from easyedit_moe.editors.global_ import GlobalEditor
from easyedit_moe.errors import DataError, DenseModelError, HyperParamsError, MethodError, NumericalError
from easyedit_moe.hparams import hyperparams_class


def test_each_method_starts_from_the_same_weights_and_leaves_them(task: Task, tmp_path: Path) -> None:
    settings = [hyperparams_class(m).from_dict(tiny_hparams(tmp_path, m)) for m in METHODS]
    before = state_of(task.model)
    seen = []
    result = compare(task, settings, on_row=lambda row: seen.append(row.method))
    assert_same_state(before, state_of(task.model))
    assert seen == ["pre-edit", *METHODS]
    again = compare(task, settings[::-1])
    rows = {row.method: row for row in again.rows}
    for row in result.rows:
        assert row.scores == rows[row.method].scores
    assert result.rows[0].routing["edit"]["mean"] == 100
    assert all(row.seconds["targets"] > 0 and row.peak_memory_bytes > 0 for row in result.rows[1:])


def test_first_targets_are_shared_only_where_nothing_differs(task: Task, tmp_path: Path, monkeypatch) -> None:
    calls = []
    original = solving.found_targets
    monkeypatch.setattr(solving, "found_targets", lambda *a, **k: calls.append(1) or original(*a, **k))
    names = ("Global", "MoTE", "MoEEdit-BCD")
    settings = [hyperparams_class(m).from_dict(tiny_hparams(tmp_path, m)) for m in names]
    result = compare(task, settings)
    assert len(calls) == 1 + 3  # one first batch, three second ones
    assert all(row.seconds["targets"] > 0 for row in result.rows[1:])
    calls.clear()
    other = hyperparams_class("MoTE").from_dict(tiny_hparams(tmp_path, "MoTE", kl_factor=0.5))
    alone = compare(task, [settings[0], other])
    assert len(calls) == 4
    assert alone.rows[1].scores == result.rows[1].scores


def test_sites_are_compared_and_rows_say_what_was_edited(task: Task, tmp_path: Path) -> None:
    task = replace(task, model=tiny_model("qwen2_moe"))
    before = state_of(task.model)
    settings = [
        hyperparams_class("Global").from_dict(tiny_hparams(tmp_path, "Global", site=site, metric="identity"))
        for site in ("experts", "shared_expert")
    ]
    rows = compare(task, settings, labels=["routed", "shared"]).rows
    assert_same_state(before, state_of(task.model))
    assert [(row.method, row.edits) for row in rows[1:]] == [("routed", "experts"), ("shared", "shared expert")]
    assert rows[2].hparams["site"] == "shared_expert"


def test_ours_are_refused_on_a_dense_model_before_it_is_scored(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "evaluate", lambda *a, **k: pytest.fail("scored"))
    settings = [hyperparams_class(m).from_dict(tiny_hparams(tmp_path, m)) for m in METHODS]
    dense = replace(task, model=tiny_model("dense"))
    before = state_of(dense.model)
    with pytest.raises(DenseModelError, match="no experts, which MoTE, MoEEdit-BCD, Global\\+speedup would edit"):
        compare(dense, settings)
    assert_same_state(before, state_of(dense.model))


def test_scores_are_those_after_all_batches(task: Task, tmp_path: Path) -> None:
    values = tiny_hparams(tmp_path, "Global", metric="identity", lambda_reg=1e-3, v_num_grad_steps=20, v_lr=0.5)
    hparams = hyperparams_class("Global").from_dict({**values, "clamp_norm_factor": 10.0})
    row = compare(task, [hparams]).rows[1]
    editor, memory = GlobalEditor(hparams, progress=False), None
    for start in (0, 2):
        batch = [r.request for r in task.records[start : start + 2]]
        memory = editor.edit(task.model, task.tok, batch, memory).memory
    assert comparing.evaluate(task.model, task.tok, task.records).efficacy == row.scores.efficacy


def test_an_error_in_the_second_batch_restores_the_first(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = GlobalEditor.solve, []

    def solve(self: GlobalEditor, *args: object) -> object:
        calls.append(1)
        if len(calls) > 3:
            raise NumericalError("planted")
        return original(self, *args)

    monkeypatch.setattr(GlobalEditor, "solve", solve)
    before = state_of(task.model)
    with pytest.raises(NumericalError, match="planted"):
        compare(task, [hyperparams_class("Global").from_dict(tiny_hparams(tmp_path, "Global"))])
    assert_same_state(before, state_of(task.model))


def test_command_writes_table_json_and_chart(folder: Path) -> None:
    done = run_compare(folder, "--methods", "MoTE,MoEEdit", "--methods", "Global+speedup")
    assert done.exit_code == 0, done.output
    saved = json.loads((folder / "out" / "results.json").read_text())
    assert saved["schema"] == 2
    assert [row["method"] for row in saved["rows"]] == ["pre-edit", *METHODS]
    for row in saved["rows"]:
        assert set(row["efficacy"]) >= {"mean", "stderr", "low", "high", "interval", "values"}
        assert set(row["seconds"]) == {"statistics", "targets", "solve", "write", "diagnose", "evaluate"}
        assert {"generalisation", "specificity", "utility", "routing_similarity", "peak_memory_bytes"} <= set(row)
    assert {row["edits"] for row in saved["rows"][1:]} == {"experts"}
    provenance = saved["provenance"]
    assert provenance["hparams"]["MoTE"]["layers"] == [1, 2]
    assert len(provenance["model_fingerprint"]) == 64
    assert provenance["versions"]["torch"] == torch.__version__
    assert (folder / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "| MoTE | easyedit_moe | experts | counterfact |" in (folder / "out" / "table.md").read_text()
    assert not list((folder / "out").glob("*.partial*"))


def test_command_can_skip_records_and_change_dtype(folder: Path) -> None:
    done = run_compare(folder, "--methods", "MoTE", "--edits", "2", "--skip", "2", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    row = json.loads((folder / "out" / "results.json").read_text())["rows"][1]
    assert row["hparams"]["dtype"] == "bfloat16"
    assert row["rounding_loss"] > 1e-3


def test_the_protocol_can_be_chosen_and_stands_beside_the_scores(folder: Path) -> None:
    done = run_compare(folder, "--methods", "MoTE", "--edits", "2", "--protocol", "token_accuracy")
    assert done.exit_code == 0, done.output
    saved = json.loads((folder / "out" / "results.json").read_text())
    assert {row["protocol"] for row in saved["rows"]} == {saved["provenance"]["protocol"]} == {"token_accuracy"}
    assert "| MoTE | easyedit_moe | experts | token_accuracy |" in (folder / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "MoTEE"], "Did you mean 'MoTE'"),
        (["--methods", "MoE-ROME"], "no hparams for MoE-ROME"),
        (["--data", "missing.json"], "does not exist"),
        (["--model", "nowhere/tiny"], "can't be loaded"),
        (["--methods", "MoTE", "--edits", "9"], "has 4 usable records"),
        (["--methods", "MoTE", "--edits", "0"], "edits and batch-size must be >= 1"),
        (["--methods", "MoTE", "--protocol", "zsre"], "by the protocol counterfact or token_accuracy"),
        (["--methods", "MoTE", "--dtype", "int8"], "float32, bfloat16, float16"),
    ],
)
def test_command_explains_bad_input_and_writes_nothing(folder: Path, args: list[str], message: str) -> None:
    done = run_compare(folder, "--methods", "MoTE", *args)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not (folder / "out" / "results.json").exists()


def test_command_refuses_an_unusable_output_folder(folder: Path) -> None:
    (folder / "file").write_text("x")
    done = run_compare(folder, "--methods", "MoTE", "--out", str(folder / "file" / "out"))
    assert done.exit_code == 2
    assert "can't be written" in " ".join(done.output.split())


def test_methods_command_lists_every_method() -> None:
    out = CliRunner().invoke(app, ["methods"]).output
    for name in ("MoTE", "MoEEdit-BCD", "BCD+speedup", "Global", "Global+speedup", "MoE-MEMIT", "MoE-ROME"):
        assert name in out


def test_resolve_hparams(folder: Path) -> None:
    assert resolve_hparams("MoTE", "Qwen/Qwen3-30B-A3B", None, {}).layers == [3, 4, 5, 6, 7]
    file = folder / "hparams" / "MoTE" / "tiny.yaml"
    assert resolve_hparams("MoTE", "whatever", file, {"lambda_reg": 7.0}).lambda_reg == 7.0
    with pytest.raises(MethodError, match="Did you mean"):
        resolve_hparams("Globl", "tiny", None, {})
    with pytest.raises(HyperParamsError, match=r"Known models: .*qwen3-30b-a3b"):
        resolve_hparams("MoTE", "tiny", None, {})


def test_load_task_counts_unusable_records(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = [*tiny_records(), {"requested_rewrite": {"prompt": "{} is", "subject": "", "target_new": {"str": "x"}}}]
    (folder / "broken.json").write_text(json.dumps(broken))
    loaded = load_task(str(folder / "tiny"), str(folder / "broken.json"), 4, 0, 2, "float32", "cpu")
    assert loaded.provenance["skipped_records"] == 1
    assert "unusable" in caplog.text
    with pytest.raises(DataError, match="4 usable"):
        load_task(str(folder / "tiny"), str(folder / "broken.json"), 5, 0, 2, "float32", "cpu")


def test_routing_is_watched_on_other_edits(folder: Path) -> None:
    """The preservation set are edits of the file that are not made; of them, the first thousand."""
    loaded = load_task(str(folder / "tiny"), str(folder / "data.json"), 2, 1, 2, "float32", "cpu")
    prompts = [record["requested_rewrite"]["prompt"] for record in tiny_records()]
    filled = [p.replace("{}", r["requested_rewrite"]["subject"]) for p, r in zip(prompts, tiny_records(), strict=True)]
    assert loaded.preserved == (filled[0], filled[3])
    assert loaded.provenance["preserved_prompts"] == 2
    row = compare(loaded, [], progress=False).rows[0]
    assert set(row.routing["preservation"]["per_layer"]) == {0, 1, 2, 3}
    assert set(row.routing["edit"]["windows"]) == {"early", "middle", "late"}


def test_rows_without_neighbours_show_a_dash(task: Task) -> None:
    records = tuple(type(r)(r.request, r.paraphrases, ()) for r in task.records)
    result = compare(Task(task.model, task.tok, records, "counterfact", 2, task.provenance), [])
    assert report.cells(result.rows[0])[report.COLUMNS.index("generalisation")] != "-"
    assert report.cells(result.rows[0])[report.COLUMNS.index("specificity")] == "-"


def test_all_means_every_method_of_ours() -> None:
    assert sorted(ALL_METHODS) == sorted(method_names())
