"""EasyEdit's own metrics in a comparison. Everything here needs a checkout of EasyEdit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from tiny import assert_same_state, state_of, tiny_model, tiny_tokenizer
from tiny_comparison import tiny_hparams, tiny_records
from typer.testing import CliRunner

from easyedit_moe.commands.app import app
from easyedit_moe.comparison import report
from easyedit_moe.comparison.compare import compare
from easyedit_moe.comparison.task import Task
from easyedit_moe.editors import make_editor
from easyedit_moe.evaluation.metrics import Score
from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.facts.records import EvaluationRecord, Probe, ProbeGroup, load_records, parse_records
from easyedit_moe.host.baseline_hparams import PROTOCOL, BaselineHyperParams
from easyedit_moe.host.quality import EasyEditQuality
from easyedit_moe.hparams import load_hyperparams, read_yaml
from easyedit_moe.moe.loading import load_model

NAMES = ("rewrite_acc", "rephrase_acc", "locality_acc", "portability_acc")


pytestmark = pytest.mark.usefixtures("own_folder", "no_editing_warnings")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _reference(before: Any, after: Any, tok: Any, records: Sequence[EvaluationRecord]) -> dict[str, Score]:
    """The same numbers by our own scoring, one prompt at a time."""

    def score(model: Any, prompt: str, answer: str) -> Any:
        return score_targets(model, tok, [(prompt, answer)])[0]

    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for record in records:
        found["rewrite_acc"].append(score(after, record.request.prompt, record.request.target_new).token_accuracy)
        if record.paraphrases:
            found["rephrase_acc"].append(score(after, record.paraphrases[0], record.request.target_new).token_accuracy)
        groups = record.locality or (ProbeGroup("x", tuple(Probe(p, (a,)) for p, a in record.neighbours)),)
        kept = []
        for group in groups:
            pairs = [
                [score(m, probe.prompt, probe.answers[0]).predicted for m in (before, after)] for probe in group.probes
            ]
            kept.append(_mean([_mean([a == b for a, b in zip(x, y, strict=True)]) for x, y in pairs]))
        found["locality_acc"].append(_mean(kept))
        asked = [
            _mean([score(after, probe.prompt, probe.answers[0]).token_accuracy for probe in group.probes])
            for group in record.portability
        ]
        if asked:
            found["portability_acc"].append(_mean(asked))
    return {name: Score.of(values) for name, values in found.items()}


def test_numbers_are_those_of_our_own_scoring(host: ModuleType) -> None:
    records = list(load_records("factworld-easyedit").records[:5])
    asked = ProbeGroup("reasoning", tuple(Probe(prompt, (records[0].request.target_new,)) for prompt in
                                          (records[0].request.prompt, records[0].paraphrases[0])))  # fmt: skip
    records[0] = EvaluationRecord(**{**vars(records[0]), "portability": (asked,)})
    (plain, tok), (model, _) = load_model("factworld", "float32"), load_model("factworld", "float32")
    tok.padding_side = "left"
    quality = EasyEditQuality(model, tok, records)
    untouched = quality.measure("pre-edit")
    assert untouched["locality_acc"] == Score.of([1.0] * 5)
    values = {
        "layers": [0, 1, 2],
        "metric": "identity",
        "v_num_grad_steps": 25,
        "context_prefixes": [],
        "lambda_reg": 0.5,
    }
    hp = load_hyperparams("Global/factworld", **values)
    make_editor(hp, progress=False).edit(model, tok, [record.request for record in records])
    edited = quality.measure("Global")
    for name, score in _reference(plain, model, tok, records).items():
        assert edited[name].mean == pytest.approx(score.mean), name
        assert edited[name].stderr == pytest.approx(score.stderr), name
        assert edited[name].count == score.count, name
    assert edited["rewrite_acc"].mean > untouched["rewrite_acc"].mean + 20
    assert edited["portability_acc"].count == 1
    assert edited["locality_acc"].mean < 100
    assert tok.padding_side == "left"


def test_measuring_leaves_model_and_tokenizer(host: ModuleType) -> None:
    model, tok = tiny_model("gpt_oss"), tiny_tokenizer(pad=False)
    model.train()
    before = state_of(model)
    quality = EasyEditQuality(model, tok, parse_records(tiny_records()).records)
    found = quality.measure("MoTE")
    assert_same_state(before, state_of(model))
    assert tok.pad_token is None
    assert {name: score.count for name, score in found.items()} == dict(zip(NAMES, (4, 4, 4, 0), strict=True))


@pytest.fixture
def task() -> Task:
    found = parse_records(tiny_records())
    provenance = {"model": "a-t5-name", "edits": 4, "batch_size": 2, "protocol": "counterfact"}
    return Task(tiny_model(), tiny_tokenizer(), found.records, found.protocol, 2, provenance)


def _settings(folder: Path) -> list[Any]:
    strong = {"metric": "identity", "lambda_reg": 1e-3, "v_num_grad_steps": 8, "v_lr": 0.5, "clamp_norm_factor": 20.0}
    (folder / "global.yaml").write_text(yaml.safe_dump(tiny_hparams(folder, "Global", **strong)))
    theirs = {"layers": [1, 2], "num_steps": 3, "lm_head_module": "lm_head", "model_name": "tiny", "lr": 0.05}
    (folder / "ft.yaml").write_text(yaml.safe_dump(read_yaml("FT/factworld") | theirs))
    return [load_hyperparams(folder / "global.yaml"), BaselineHyperParams.read("FT", folder / "ft.yaml")]


def test_both_protocols_stand_in_the_rows_and_are_measured_after_all_edits(
    host: ModuleType, task: Task, tmp_path: Path
) -> None:
    settings, before = _settings(tmp_path), state_of(task.model)
    result = compare(task, settings, easyedit_metrics=True)
    assert_same_state(before, state_of(task.model))
    plain = compare(task, settings)
    assert [row.scores for row in plain.rows] == [row.scores for row in result.rows]
    assert all(row.easyedit is None for row in plain.rows)
    rows = {row.method: row for row in result.rows}
    assert set(rows) == {"pre-edit", "Global", "FT"}
    assert rows["pre-edit"].easyedit["locality_acc"].mean == 100
    quality = EasyEditQuality(task.model, task.tok, task.records)
    editor, memory, scores = make_editor(settings[0], progress=False), None, []
    for start in (0, 2):
        batch = [record.request for record in task.records[start : start + 2]]
        memory = editor.edit(task.model, task.tok, batch, memory).memory
        scores.append(quality.measure("Global"))
    assert str(scores[1]) == str(rows["Global"].easyedit)  # as text, since there is no portability and NaN != NaN
    assert str(scores[0]) != str(scores[1])
    text = report.markdown(result)
    assert f"The same edits by the protocol of {PROTOCOL}" in text
    assert "| method | code | rewrite_acc | rephrase_acc | locality_acc | portability_acc |" in text
    assert "| FT | easyeditor | experts |" in text
    assert "| Global | easyedit_moe | experts |" in text
    assert "protocol of" not in report.markdown(plain)
    first, second = report.tables(result)
    assert "probability comparison" in first.title
    assert "teacher-forced token accuracy" in second.title
    assert second.row_count == 3
    assert len(report.tables(plain)) == 1
    saved = json.loads(report.write_results(result, tmp_path)[0].read_text())
    for row, entry in zip(result.rows, saved["rows"], strict=True):
        assert entry["easyedit"]["rewrite_acc"]["mean"] == row.easyedit["rewrite_acc"].mean
        assert entry["code"] == row.code
    assert json.loads(report.write_results(plain, tmp_path)[0].read_text())["rows"][0]["easyedit"] is None


@pytest.mark.parametrize("flag", ["", "--no-easyedit-metrics"])
def test_the_command_runs_both_kinds_of_methods(flag: str, host: ModuleType, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "data.json").write_text(json.dumps(tiny_records()), encoding="utf-8")
    _settings(tmp_path)
    for method, file in (("Global", "global.yaml"), ("FT", "ft.yaml")):
        (tmp_path / "hparams" / method).mkdir(parents=True)
        (tmp_path / file).rename(tmp_path / "hparams" / method / "tiny.yaml")
    done = CliRunner().invoke(
        app,
        [
            "compare", "--model", str(tmp_path / "tiny"), "--data", str(tmp_path / "data.json"), "--edits", "4",
            "--batch-size", "2", "--hparams", str(tmp_path / "hparams"), "--out", str(tmp_path / "out"),
            "--stats-dir", str(tmp_path / "stats"), "--methods", "Global", "FT", *([flag] if flag else []),
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["method"], row["code"]) for row in saved["rows"]] == [
        ("pre-edit", "easyedit_moe"), ("Global", "easyedit_moe"), ("FT", "easyeditor")
    ]  # fmt: skip
    assert all((row["easyedit"] is None) == bool(flag) for row in saved["rows"])
    assert ("rewrite_acc" in done.output) != bool(flag)
