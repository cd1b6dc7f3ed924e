"""Random methods by several seeds, and which methods differ from the best."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_comparison import run_compare, tiny_hparams

from easyedit_moe.comparison import report
from easyedit_moe.comparison.compare import Comparison, compare
from easyedit_moe.comparison.differences import differences, said
from easyedit_moe.comparison.rows import SCORES, Row
from easyedit_moe.comparison.saved import earlier_rows, row_of, save_rows
from easyedit_moe.comparison.seeds import seeded
from easyedit_moe.comparison.task import Task
from easyedit_moe.errors import HyperParamsError
from easyedit_moe.evaluation.metrics import EvaluationResult
from easyedit_moe.evaluation.paired import MCNEMAR, SIGN
from easyedit_moe.evaluation.summary import Score
from easyedit_moe.hparams import hyperparams_class

DOCS = Path(__file__).parents[2] / "docs"


def hparams(folder: Path, method: str, **changes: Any) -> Any:
    return hyperparams_class(method).from_dict(tiny_hparams(folder, method, **changes))


def test_only_random_methods_run_by_every_seed(tmp_path: Path) -> None:
    drawn = hparams(tmp_path, "MoEEdit-BCD")
    assert [(seed, one.seed) for seed, one in seeded(drawn, [3, 1])] == [(3, 3), (1, 1)]
    assert seeded(hparams(tmp_path, "Global"), [0, 1]) == []
    sampled = hparams(tmp_path, "Global", mom2_dataset="generated")
    assert [one.generated_seed for _, one in seeded(sampled, [4, 5])] == [4, 5]
    assert seeded(drawn, []) == []
    with pytest.raises(HyperParamsError, match="must differ; found 1, 1"):
        seeded(drawn, [1, 1])


def test_a_row_over_seeds_is_the_mean_of_theirs(task: Task, tmp_path: Path) -> None:
    methods = [hparams(tmp_path, "MoEEdit-BCD", num_passes=1, lambda_reg=1e-3), hparams(tmp_path, "Global")]
    made = compare(task, methods, progress=False, seeds=[0, 7])
    alone = [compare(task, [replace(methods[0], seed=s)], progress=False).rows[1] for s in (0, 7)]
    row = made.rows[1]
    assert (row.seeds, made.rows[2].seeds) == ((0, 7), ())
    for name in SCORES:
        means = [getattr(one.scores, name).mean for one in alone]
        assert getattr(row.scores, name).mean == pytest.approx(sum(means) / 2)
        assert [one[name] for one in row.per_seed] == means
    expected = sum(one.routing["edit"]["per_layer"][1] for one in alone) / 2
    assert row.routing["edit"]["per_layer"][1] == pytest.approx(expected)
    assert report.cells(row)[0] == "MoEEdit-BCD, 2 seeds"
    save_rows(made, tmp_path / "out")
    read = earlier_rows(tmp_path / "out", task.provenance, ["MoEEdit-BCD", "Global"])
    again: list[str] = []
    compare(task, methods, lambda r: again.append(r.method), earlier=read, progress=False, seeds=[0, 7])
    assert again == []
    compare(task, methods, lambda r: again.append(r.method), earlier=read, progress=False, seeds=[0, 8])
    assert again == ["MoEEdit-BCD"], "other seeds are another row, and what draws nothing is taken over"


def test_the_command_takes_seeds(folder: Path) -> None:
    done = run_compare(folder, "--methods", "MoEEdit-BCD", "--edits", "2", "--seeds", "0,1")
    assert done.exit_code == 0, done.output
    saved = json.loads((folder / "out" / "results.json").read_text())
    assert saved["rows"][1]["seeds"] == [0, 1]
    assert len(saved["rows"][1]["per_seed"]) == 2
    for wrong in ("0,x", "1,1", "-1"):
        refused = run_compare(folder, "--methods", "MoEEdit-BCD", "--seeds", wrong)
        assert refused.exit_code == 2
        assert "different whole numbers" in " ".join(refused.output.split())


# ---------------------------------------------------------------- differences


def _row(method: str, values: list[float | None], shares: list[float | None] | None = None) -> Row:
    score, empty = Score.of(values), Score.of([None] * len(values))
    scores = EvaluationResult("counterfact", score, Score.of(shares) if shares else empty, empty, score, score)
    routing = {"preservation": {"mean": 100.0, "per_layer": {}}, "edit": {"mean": 100.0, "per_layer": {}}}
    seconds = dict.fromkeys(("statistics", "targets", "solve", "write", "diagnose", "evaluate"), 0.0)
    return Row(method, "experts", "easyedit_moe", scores, routing, seconds, 0)


def test_differences_from_the_best() -> None:
    n = 20
    rows = [
        _row("pre-edit", [1.0] * n),  # is no method, so never the best
        _row("good", [1.0] * 19 + [0.0], [0.9 + 0.001 * i for i in range(n)]),
        _row("as good", [1.0] * 18 + [0.0, 1.0], [0.5] * n),
        _row("bad", [0.0] * 10 + [1.0] * 10, [None] * n),
    ]
    found = differences(rows)
    assert found[0] == {}
    assert (found[1]["efficacy"].paired, found[1]["efficacy"].best) == (None, "good")
    close, far = found[2]["efficacy"], found[3]["efficacy"]
    assert (close.paired.test, close.paired.better, close.paired.worse, close.differs) == (MCNEMAR, 1, 1, False)
    assert (far.paired.better, far.paired.worse) == (1, 10)
    assert far.paired.p == pytest.approx(2 * 12 / 2**11)
    assert far.p_adjusted == pytest.approx(2 * far.paired.p), "two methods were tested"
    assert found[2]["generalisation"].paired.test == SIGN
    assert "generalisation" not in found[3]
    assert said(found[1]) == "no"
    assert said(found[2]) == "generalisation"
    assert said(found[3]) == "efficacy, utility, exact_match"
    comparison = Comparison(tuple(rows), {"protocol": "counterfact"})
    text = report.markdown(comparison)
    assert "McNemar" in text
    assert "w: Wilson" in text
    assert "| efficacy, utility, exact_match |" in text
    saved = comparison.to_dict()["rows"][3]["differs_from_best"]["efficacy"]
    assert (saved["best"], saved["differs"], saved["test"]["worse"]) == ("good", True, 10)
    assert all(one == {} for one in differences(rows[:2])), "there is nothing to compare with"


@pytest.mark.parametrize("name", ["comparison.json", "easyedit.json", "ablations.json"])
def test_files_of_schema_1_are_read(name: str) -> None:
    saved = json.loads((DOCS / name).read_text(encoding="utf-8"))
    rows = [row_of(values, saved["provenance"]["protocol"]) for values in saved["rows"]]
    assert len(rows) > 3
    for row, values in zip(rows, saved["rows"], strict=True):
        assert row.scores.efficacy.mean == values["efficacy"]["mean"]
    if saved["schema"] == 1:
        assert differences(rows) == [{}] * len(rows)
        assert " ± " in report.markdown(Comparison(tuple(rows), saved["provenance"]))
