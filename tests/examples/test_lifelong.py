"""The lifelong example: its stream supersedes facts, its points are what they say, and it goes on where it was."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from easyedit_moe import load_hyperparams
from easyedit_moe.errors import DataError, PatchError
from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.facts.requests import check_batch
from easyedit_moe.factworld import model_path
from easyedit_moe.factworld.world import RELATIONS, build_world
from easyedit_moe.moe.loading import load_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "lifelong.py"
SMALL = ["--edits", "5", "--batch-size", "2", "--every", "2", "--asked", "8", "--set", "v_num_grad_steps=8"]


@pytest.fixture(scope="module")
def lifelong() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lifelong", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lifelong"] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE.parent)
        spec.loader.exec_module(module)
    return module


def run(lifelong: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["lifelong.py", "--out", str(out), *SMALL, *more])
    lifelong.main()
    found: list[dict[str, Any]] = json.loads((out / "lifelong.json").read_text(encoding="utf-8"))["runs"]["Global"][
        "points"
    ]
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_the_stream_supersedes_and_says_what_it_does_not(lifelong: ModuleType, seed: int) -> None:
    found, world = lifelong.stream(2500, 50, seed), build_world()
    value = {r.templates[0].format(p): world.facts[p][r.name] for p in world.evaluated for r in RELATIONS}
    for one in found.edits:
        assert one.target_new != value[one.prompt], "an edit changes something"
        value[one.prompt] = one.target_new
    assert dict(found.latest(0, 2500)) == {one.prompt: value[one.prompt] for one in found.edits}
    assert len(found.latest(0, 2500)) < 1300
    later = {one.prompt for one in found.edits[100:]}
    assert found.retained
    assert not {prompt for prompt, _ in found.retained} & later
    assert len(found.retained) >= 45, "every second one of the first hundred is left alone"
    edited = {one.subject for one in found.edits}
    assert not any(person in prompt for prompt, _ in found.untouched for person in edited)
    assert len(found.untouched) == len(found.texts) == 50
    for start in range(0, 2500, 100):
        check_batch(found.edits[start : start + 100])


def test_an_interrupted_run_goes_on_to_the_same_points(
    lifelong: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(lifelong, tmp_path / "whole", monkeypatch)
    assert [point["edits"] for point in whole] == [0, 2, 4, 5]
    assert whole[0]["specificity, never edited"] > 90
    assert whole[0]["seconds per edit"] is None
    assert all(point["seconds per edit"] > 0 for point in whole[1:])
    assert max(whole[-1]["norm growth per layer"].values()) > 1
    assert all(layer["keys"] == 5 * 3 * 4 / 16 for layer in whole[-1]["capacity"].values()), (
        "3 contexts, 4 of 16 experts"
    )
    assert all(0 < layer["taken"] <= layer["keys"] < layer["directions"] for layer in whole[-1]["capacity"].values())
    file = tmp_path / "whole" / "lifelong.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["runs"]["Global"]["points"] = content["runs"]["Global"]["points"][:2]
    file.write_text(json.dumps(content), encoding="utf-8")
    again = run(lifelong, tmp_path / "whole", monkeypatch)
    assert [point["weights"] for point in again] == [point["weights"] for point in whole]
    assert again[:2] == whole[:2]
    assert [point["seconds per edit"] is None for point in again] == [True, False, True, False]
    for kind in ("efficacy, all so far", "specificity, never edited", "perplexity"):
        assert [point[kind] for point in again] == [point[kind] for point in whole]
    content["runs"]["Global"]["points"][1]["weights"] = "0" * 64
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(PatchError, match="after 2 edits"):
        run(lifelong, tmp_path / "whole", monkeypatch)


def test_other_settings_are_not_mixed(
    lifelong: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"method": "Global", "edits": 9, "batch_size": 2, "every": 2, "asked": 8, "seed": 0, "set": {}}
    content = {"schema": 2, "runs": {"Global": {"settings": settings, "points": []}}}
    (tmp_path / "lifelong.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SystemExit):
        run(lifelong, tmp_path, monkeypatch)
    assert "is of other settings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(lifelong, tmp_path / "new", monkeypatch, "--every", "3")
    assert "a multiple of it" in capsys.readouterr().err


def test_batches_edited_again_and_statistics_of_names(
    lifelong: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    once = run(lifelong, tmp_path / "once", monkeypatch, "--every", "4")
    twice = run(lifelong, tmp_path / "twice", monkeypatch, "--every", "4", "--passes", "2", "--names", "3")
    assert twice[0]["weights"] == once[0]["weights"]
    assert twice[-1]["weights"] != once[-1]["weights"]
    texts = [json.loads(line)["text"] for line in (tmp_path / "twice" / "names-3-0.jsonl").read_text().splitlines()]
    bystanders = set(build_world().bystanders)
    assert twice[-1][lifelong.UNSEEN] is None
    assert sum(text in bystanders for text in texts) == 3 * len(bystanders)
    settings = json.loads((tmp_path / "twice" / "lifelong.json").read_text())["runs"]["Global"]["settings"]
    assert (settings["passes"], settings["names"]) == (2, 3)
    with pytest.raises(SystemExit):
        run(lifelong, tmp_path / "new", monkeypatch, "--passes", "0")
    assert "--passes must be" in capsys.readouterr().err


def test_runs_of_earlier_files_go_on(lifelong: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(lifelong, tmp_path, monkeypatch)
    file = tmp_path / "lifelong.json"
    content = json.loads(file.read_text())
    for name in lifelong.ASIDE:
        del content["runs"]["Global"]["settings"][name]
    file.write_text(json.dumps(content))
    assert len(run(lifelong, tmp_path, monkeypatch)) == 4


def test_strangers_are_in_no_statistics_and_asked_apart(
    lifelong: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = run(lifelong, tmp_path, monkeypatch, "--every", "4", "--names", "1", "--strangers", "30")
    found, all_seen = lifelong.stream(5, 320, strangers=30), lifelong.stream(5, 320)
    assert points[0][lifelong.UNSEEN] > 90
    assert len(found.strangers) == 30
    assert len(found.unseen) == 30 * 4
    assert {*found.unseen, *found.untouched} == {*all_seen.untouched}
    assert found.edits == all_seen.edits
    corpus = (tmp_path / "names-1-30.jsonl").read_text(encoding="utf-8")
    texts = [json.loads(line)["text"] for line in corpus.splitlines()]
    assert not any(one in text for one in found.strangers for text in texts)
    assert len(texts) > 200


def records(path: Path, count: int) -> list[dict[str, str]]:
    """A file of the bundled world's facts, as EasyEdit lays out CounterFact."""
    world = build_world()
    facts = [(person, relation) for person in world.evaluated for relation in RELATIONS][:count]
    beside = [(person, relation) for person in world.bystanders for relation in RELATIONS]
    rows = []
    for (person, relation), (other, kind) in zip(facts, beside, strict=False):
        true = world.facts[person][relation.name]
        rows.append(
            {
                "prompt": relation.templates[0].format(person), "subject": person, "ground_truth": true,
                "target_new": next(one for one in relation.objects if one != true),
                "locality_prompt": kind.templates[0].format(other),
                "locality_ground_truth": world.facts[other][kind.name],
            }
        )  # fmt: skip
    path.write_text(json.dumps(rows), encoding="utf-8")
    return rows


@pytest.fixture(scope="module")
def world_model() -> tuple[Any, Any]:
    return load_model(str(model_path()), "float32")


def test_records_go_from_one_answer_to_the_other(
    lifelong: ModuleType, world_model: tuple[Any, Any], tmp_path: Path
) -> None:
    rows = {row["prompt"]: row for row in records(tmp_path / "records.json", 160)}
    found = lifelong.record_stream(tmp_path / "records.json", *world_model, 400, 40, 3)
    value = {prompt: row["ground_truth"] for prompt, row in rows.items()}
    for one in found.edits:
        row = rows[one.prompt]
        assert {value[one.prompt], one.target_new} == {row["ground_truth"], row["target_new"]}
        assert one.subject == row["subject"]
        value[one.prompt] = one.target_new
    later = {one.prompt for one in found.edits[100:]}
    assert found.retained
    assert not {prompt for prompt, _ in found.retained} & later
    neighbours = {row["locality_prompt"] for row in rows.values()}
    assert 30 < len(found.untouched) <= 40
    assert {prompt for prompt, _ in found.untouched} <= neighbours - {*rows}
    assert all(score.exact for score in score_targets(*world_model, found.untouched)), "what the model itself writes"
    assert len(found.texts) == 40
    assert all(len(f"{a} {b}".split()) >= 30 and b.endswith(".") for a, b in found.texts)
    more = lifelong.record_stream(tmp_path / "records.json", *world_model, 900, 40, 3)
    assert (more.edits[:400], more.untouched, more.texts) == (found.edits, found.untouched, found.texts)


def test_too_few_records_are_refused(lifelong: ModuleType, world_model: tuple[Any, Any], tmp_path: Path) -> None:
    records(tmp_path / "records.json", 150)
    with pytest.raises(DataError, match="needs 151 different facts or more; found 150"):
        lifelong.record_stream(tmp_path / "records.json", *world_model, 10, 40)


def test_another_model_and_its_records(
    lifelong: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records(tmp_path / "records.json", 160)
    (tmp_path / "own").symlink_to(model_path())
    (tmp_path / "hparams" / "Global").mkdir(parents=True)
    yaml = load_hyperparams("Global/factworld", context_prefixes=[])
    yaml.to_yaml(tmp_path / "hparams" / "Global" / "own.yaml")
    given = ["--model", str(tmp_path / "own"), "--records", str(tmp_path / "records.json")]
    points = run(lifelong, tmp_path / "out", monkeypatch, *given, "--hparams", str(tmp_path / "hparams"))
    assert [point["edits"] for point in points] == [0, 2, 4, 5]
    assert points[0]["specificity, never edited"] == 100.0
    assert points[-1]["capacity"][next(iter(points[-1]["capacity"]))]["keys"] == 5 * 4 / 16, "one context of the YAML"
    settings = json.loads((tmp_path / "out" / "lifelong.json").read_text())["runs"]["Global"]["settings"]
    assert (settings["model"], settings["records"]) == ("own", "records.json"), "no path of the machine"
    for wrong in (given, [*given, "--hparams", str(tmp_path / "hparams"), "--names", "3"]):
        with pytest.raises(SystemExit):
            run(lifelong, tmp_path / "new", monkeypatch, *wrong)
        assert "go together" in capsys.readouterr().err
