"""The script for GPUs runs as it is on a CPU at 1/16 of the shape, and counts what it says it counts."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_model import FULL, StandIn
from benchmarks.syncs import counted_syncs
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.storage.checksums import checksums

ROOT = Path(__file__).parents[1]
SMALL = ["--device", "cpu", "--scale", "16", "--layers", "4", "--edits", "3", "--batch-size", "2", "--texts", "24"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *SMALL, "--steps", "2", "--out", str(out)]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    content: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return content


def test_every_stage_is_measured_beside_its_plan(found: dict[str, Any]) -> None:
    wanted = ["targets"]
    for method in ("Global", "MoEEdit-BCD", "MoTE"):
        wanted += [f"{method}: prepare", f"{method}: edits, z ready"]
    assert [row["stage"] for row in found["stages"]] == wanted
    for row in found["stages"]:
        assert row["seconds"] > 0
        assert row["planned bytes"] > 0
        assert row["peak bytes beyond before"] >= 0
        assert row["syncs in a short run"] >= sum(row["syncs by place"].values()) > 0
    edited = found["stages"][-1]
    assert (edited["edits"], edited["batch"]) == (3, 2)
    assert 0 < edited["seconds of solve"] < edited["seconds"]


def test_every_stage_is_complete_and_says_of_which_code(found: dict[str, Any]) -> None:
    methods = ("Global", "MoEEdit-BCD", "MoTE")
    edited = [f"{method}: {what}" for method in methods for what in ("prepare", "edits, z ready")]
    assert found["complete"] == ["model", "targets", *edited, "profile"]
    assert (found["left out"], found["under way"]) == ([], None)
    assert {"easyedit_moe", "commit", "changed", "date"} == set(found["source"])


def test_what_is_cached_is_not_planned_again(found: dict[str, Any]) -> None:
    rows = {row["stage"]: row for row in found["stages"]}
    assert rows["Global: prepare"]["read from files"] == []
    for method in ("MoEEdit-BCD", "MoTE"):
        assert rows[f"{method}: prepare"]["read from files"] == ["statistics", "metric"]
    first, second = (rows[f"{method}: prepare"] for method in ("Global", "MoEEdit-BCD"))
    assert second["planned bytes"] < first["planned bytes"] / 2
    # The plan holds the moments beside every layer's null space, which takes half of its room at most.
    assert 0.8 < second["planned bytes"] / second["peak bytes beyond before"] < 2


def test_the_peak_of_all_edits_stands_beside_the_model(found: dict[str, Any]) -> None:
    rows = {row["stage"]: row for row in found["stages"]}
    assert [row["method"] for row in found["peaks"]] == ["Global", "MoEEdit-BCD", "MoTE"]
    for row in found["peaks"]:
        beyond = rows[f"{row['method']}: edits, z ready"]["peak bytes beyond before"]
        assert row["what"] == "peak of 3 edits against the model's bytes"
        assert row["prepared bytes"] > 0
        assert row["peak bytes"] == row["model bytes"] + row["prepared bytes"] + beyond
        assert 1 < row["peak / model"] <= row["with targets and preparation / model"]
        assert row["within"] == (row["with targets and preparation / model"] <= 1.1)


def test_no_stage_is_begun_after_the_minutes(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    options = gpu.Options("cpu", 16, 3, 3, 2, 24, 2, ("Global",), 0.0)
    assert gpu.run(options, out) == out
    content = json.loads(out.read_text(encoding="utf-8"))
    wanted = ["model", "targets", "Global: prepare", "Global: edits, z ready", "profile"]
    assert (content["complete"], content["left out"]) == ([], wanted)
    assert content["stages"] == []


def test_what_was_measured_is_there_when_a_stage_is_ended(tmp_path: Path) -> None:
    report = gpu.Report(tmp_path / "gpu.json", {"stages": []}, math.inf)
    report.stage("model", lambda: report.content["stages"].append(1))

    def killed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report.stage("targets", killed)
    report.end = 0.0
    content = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert content == {"stages": [1], "complete": ["model"], "under way": "targets", "left out": []}
    assert report.stage("prepare", killed) is None
    assert report.left_out == ["prepare"]


def test_the_slowest_stage_is_profiled(found: dict[str, Any]) -> None:
    slowest = max(found["stages"], key=lambda row: row["seconds"])
    assert found["profile"]["stage"] == slowest["stage"]
    spent = [row["cpu seconds"] for row in found["profile"]["operations"]]
    assert len(spent) == 10
    assert spent == sorted(spent, reverse=True)
    assert found["model"]["layers"] == 4
    assert "gpu" not in found["machine"] or torch.cuda.is_available()


def test_without_a_gpu_it_says_what_runs_everywhere(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "There is no GPU" in done.stderr


def test_the_stand_in_has_the_shape_and_computes() -> None:
    full = StandIn(1, 48, "meta", 0).config(48)
    assert {name: getattr(full, name) for name in FULL} == FULL
    model = StandIn(16, 3, "cpu", 900).build()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    layout = MoELayerView(model).layers[1].experts.layout
    assert (layout.num_experts, layout.d_model, layout.d_hidden) == (8, 128, 48)
    logits = model(input_ids=torch.arange(12)[None], use_cache=False).logits
    assert bool(torch.isfinite(logits).all())
    assert float(logits.float().std()) > 0
    again = StandIn(16, 3, "cpu", 900).build()
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)


def test_what_waits_is_counted_once_each() -> None:
    weight = torch.randn(3, 4)
    with counted_syncs("cpu") as found:
        weight.sum() + weight.mean()
        assert not found
        float(weight.sum())
        bool(weight[0, 0] > 0)
        weight.tolist()
        weight.nonzero()
        weight.cpu()
        assert found == {"elsewhere": 5}
        checksums(weight[:, None])
    assert any(place.startswith("storage/checksums.py:") for place in found)
    before = sum(found.values())
    float(weight.sum())
    assert sum(found.values()) == before
