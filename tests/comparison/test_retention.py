"""Scores on the way, and real answers, in one run of compare."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_comparison import run_compare, tiny_hparams

from easyedit_moe.comparison import report
from easyedit_moe.comparison.compare import compare
from easyedit_moe.comparison.retention import SCORES
from easyedit_moe.comparison.saved import read_results, save_rows
from easyedit_moe.comparison.task import Task
from easyedit_moe.editors import make_editor
from easyedit_moe.evaluation.metrics import evaluate
from easyedit_moe.evaluation.real_answers import RealAnswers, real_answers
from easyedit_moe.hparams import hyperparams_class


def settings(folder: Path) -> Any:
    changes = {"metric": "identity", "lambda_reg": 1e-3, "v_lr": 0.5, "v_num_grad_steps": 8, "clamp_norm_factor": 10.0}
    return hyperparams_class("Global").from_dict(tiny_hparams(folder, "Global", **changes))


@pytest.mark.parametrize("batch_size", [2, 3])
def test_scores_on_the_way_are_those_of_a_run_by_hand(task: Task, tmp_path: Path, batch_size: int) -> None:
    task = replace(task, batch_size=batch_size)
    hparams, seen = settings(tmp_path), []
    asked = task.asking(retention=True, answers=RealAnswers(3, judge=lambda *_: seen.append(1) or True, judge_name="x"))
    made = compare(asked, [hparams], progress=False)
    row = made.rows[1]
    editor, memory, patches, after = make_editor(hparams, False), None, [], []
    for start in range(0, 4, batch_size):
        batch = task.records[start : start + batch_size]
        result = editor.edit(task.model, task.tok, [r.request for r in batch], memory)
        memory = result.memory
        patches.append(result.patch)
        so_far = task.records[: start + len(batch)]
        after.append((evaluate(task.model, task.tok, so_far, task.protocol), start, len(so_far)))
    real = real_answers(task.model, task.tok, task.records, RealAnswers(3))
    for patch in reversed(patches):
        patch.restore(task.model)
    assert [edits for edits, _ in row.retention.batches] == [stop for _, _, stop in after]
    for name in SCORES:
        wanted: list[Any] = []
        for (scores, start, stop), (_, found) in zip(after, row.retention.batches, strict=True):
            assert getattr(found, name) == getattr(scores, name)
            wanted += getattr(scores, name).values[start:stop]
        assert getattr(row.retention.own, name).values == tuple(wanted)
    assert row.scores == after[-1][0]
    assert row.answers["contains"] == real.contains
    assert row.answers["judged"].mean == 100
    assert seen
    assert made.rows[0].retention is None
    assert set(made.rows[0].answers) == set(row.answers)
    _check_written(replace(made, provenance={**made.provenance, "model": "m", "edits": 4}), tmp_path)


def _check_written(made: Any, folder: Path) -> None:
    path = save_rows(made, folder / "out")
    saved = json.loads(path.read_text())
    assert saved["provenance"]["answers"] == {"max_new_tokens": 3, "stops": ["\n"], "judge": "x"}
    assert saved["rows"][1]["retention"]["batches"][0]["efficacy"]["count"] == made.rows[1].retention.batches[0][0]
    read = read_results(path)
    assert report.markdown(read) == report.markdown(made)
    assert "Retention: each record right after" in report.markdown(made)
    assert "| Global | exact_match |" in report.markdown(made)
    assert [len(t.columns) for t in report.tables(made)] == [len(report.COLUMNS), 10, 5]


def test_without_being_asked_nothing_more_is_measured(task: Task, tmp_path: Path) -> None:
    made = compare(task, [], progress=False)
    assert (made.rows[0].retention, made.rows[0].answers) == (None, None)
    assert report.further(made) == []


def test_the_command(folder: Path) -> None:
    arguments = ("--methods", "Global+speedup", "--edits", "2", "--batch-size", "1")
    done = run_compare(folder, *arguments, "--retention", "--answers")
    assert done.exit_code == 0, done.output
    rows = json.loads((folder / "out" / "results.json").read_text())["rows"]
    assert [one["edits"] for one in rows[1]["retention"]["batches"]] == [1, 2]
    assert set(rows[1]["answers"]) == {"exact", "contains", "rephrase_exact", "rephrase_contains"}
    half = run_compare(folder, *arguments, "--judge", "http://localhost:1")
    assert half.exit_code == 2
    assert "both --judge URL and --judge-model NAME" in " ".join(half.output.split())
