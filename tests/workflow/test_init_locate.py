"""``init --locate``: layers by measuring, what the YAML says of it, and that a failure leaves no file."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from edited_folders import files_of, model_of, saved
from tiny_comparison import tiny_records
from typer.testing import CliRunner

from easyedit_moe.commands.app import app
from easyedit_moe.comparison.rows import PRE_EDIT
from easyedit_moe.comparison.tuned import check_held_out, record_hash, rows_file
from easyedit_moe.errors import DataError, EditingError, WriteError
from easyedit_moe.facts.records import load_facts, load_records
from easyedit_moe.hparams import load_hyperparams
from easyedit_moe.hparams.sources import sourced_values
from easyedit_moe.workflow import init as module
from easyedit_moe.workflow import locate as locating
from easyedit_moe.workflow.init import init
from easyedit_moe.workflow.locate import Location
from easyedit_moe.workflow.locate_report import tried, verdict
from easyedit_moe.workflow.locate_saved import Measured

QUICK = {"v_num_grad_steps": 2, "metric": "identity"}
REAL = locating.locate
Asked = list[Any]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model") / "my-mixtral", model_of("mixtral", torch.float32))


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    file = tmp_path / "facts.json"
    file.write_text(json.dumps(tiny_records(3)), encoding="utf-8")
    return file


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The real measurement, in few steps, of few windows and without statistics; the settings it was asked for."""
    asked: Asked = []

    def locate(facts: Any, model: Any, method: str, hparams: Any, out: Any, settings: Any, **more: Any) -> Location:
        asked.append((facts, hparams, settings))
        return REAL(facts, model, method, hparams, out, replace(settings, windows=5), overrides=QUICK, **more)

    monkeypatch.setattr(locating, "locate", locate)
    return asked


def planted(utilities: dict[tuple[int, ...], float], left: int = 0, data: str = "neutral") -> Callable[..., Location]:
    """A `locate` that found these windows; 30 is the utility of the unedited model."""

    def locate(facts: Any, model: Any, method: str, hparams: Any, *_: Any, **__: Any) -> Location:
        about = {"data": data, "hparams": hparams.to_dict(), "edits": 7, "skip": 0, "model": model}
        found = Measured(about)
        found.left = {"trial": left}
        score = {"stderr": 1.25, "count": 7}
        if utilities:
            found.add("trial", PRE_EDIT, {"utility": {"mean": 30.0, **score}})
        for window, mean in utilities.items():
            name = "-".join(map(str, window))
            found.add("trial", name, {"layers": list(window), "utility": {"mean": mean, **score}})
        return Location(found, (), (0, 1, 2, 3), tuple(utilities) + ((9,),) * left)

    return locate


def comment(file: Path, name: str = "layers") -> str:
    (line,) = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith(f"{name}:")]
    return line.partition("  # ")[2]


@pytest.mark.parametrize(("method", "solver"), [("MoTE", "MoTE"), ("MEMoE", "Global"), ("MoE-FT", "Global")])
def test_the_best_window_of_a_trial(
    method: str, solver: str, mixtral: Path, facts: Path, tmp_path: Path, quick: Asked
) -> None:
    file = tmp_path / "new" / "my.yaml"
    found = init(str(mixtral), method, facts, file, locate=True, progress=False)
    measured = Measured.read(tmp_path / "new" / "my.locate.json")
    best, *others = tried(measured.rows["trial"])
    assert others
    hparams = load_hyperparams(file)
    assert hparams == found.hparams()
    assert (hparams.alg_name, hparams.layers) == (method, best["layers"])
    assert measured.provenance["hparams"]["alg_name"] == solver
    utility, before = best["utility"], measured.rows["trial"][PRE_EDIT]["utility"]["mean"]
    said = comment(file)
    assert f"window {best['name']} has utility {utility['mean']:.1f} ± {utility['stderr']:.1f}" in said
    assert f"in a trial with 3 facts of {facts} by {solver}, the best of {len(others) + 1} windows tried" in said
    assert f"unedited {before:.1f}; rows: my.locate.json" in said
    assert {one.name: one.source for one in sourced_values(file)}["layers"] == said
    text = " ".join(file.read_text(encoding="utf-8").replace("\n# ", " ").split())
    assert "its layers by trials on it" in text
    assert all(line in text for line in verdict(Location(measured, (), (), ())))
    widths = {len(row["layers"]) for row in (best, *others)}
    assert max(widths) == {"MoTE": 3, "MEMoE": 1, "MoE-FT": 1}[method], "1, 2 and as many as by depth, or one"
    assert {path.name for path in file.parent.iterdir()} == {"my.yaml", "my.locate.json"}
    (given,) = quick
    assert given[2].stages == ("statistics", "trial")
    assert given[1].batch_size == 3, "trials use what the YAML says"


def test_located_settings_are_not_scored_on_what_they_were_located_on(
    mixtral: Path, facts: Path, tmp_path: Path, quick: Asked
) -> None:
    folder = tmp_path / "hp"
    file = folder / "Global" / "my-mixtral.yaml"
    few = tmp_path / "few.json"
    few.write_text(json.dumps(tiny_records(2)), encoding="utf-8")
    init(str(mixtral), "Global", few, file, locate=True, progress=False)
    records = load_records(str(facts)).records
    used = json.loads(rows_file(file).read_text(encoding="utf-8"))["records"]
    assert used == [record_hash(record) for record in records[:2]]
    check_held_out(file, records[2:])
    check_held_out(folder, records, [folder / "MoTE" / "my-mixtral.yaml"])
    for path, files in ((file, None), (folder, [file])):
        with pytest.raises(DataError, match=r"2 of the 3 records were used to locate the layers of .*mixtral.yaml"):
            check_held_out(path, records, files)
    common = ["compare", "--model", str(mixtral), "--data", str(facts), "--methods", "Global"]
    for path in (file, folder):
        refused = CliRunner().invoke(
            app, [*common, "--hparams", str(path), "--edits", "3", "--out", str(tmp_path / "a")]
        )
        assert refused.exit_code == 2
        assert "were used to locate the layers" in " ".join(refused.output.split())
    rows_file(file).write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="does not say which records were used for locating"):
        check_held_out(file, records)


def test_nothing_is_held_back_where_no_window_was_tried(
    mixtral: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locating, "locate", planted({}))
    init(str(mixtral), "Global", facts, tmp_path / "my.yaml", locate=True)
    check_held_out(tmp_path / "my.yaml", load_records(str(facts)).records)


def test_the_utility_decides_and_the_rest_fits_the_window(
    mixtral: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locating, "locate", planted({(0,): 70.0, (2, 3): 91.04, (1, 2): 80.0}, left=2))
    file = tmp_path / "my.yaml"
    found = init(str(mixtral), "Global", None, file, locate=True, budget=3.0)
    assert found.hparams().layers == [2, 3]
    assert "utility 91.0 ± 1.2 in a trial with 7 facts of neutral by Global, the best of 3 windows" in comment(file)
    assert "tried (of 5); unedited 30.0" in comment(file)
    assert "Not measured yet: 2 of trial." in file.read_text(encoding="utf-8")
    monkeypatch.setattr(locating, "locate", planted({(3,): 50.0}, data="given"))
    one = init(str(mixtral), "Global", load_facts(facts), None, locate=True)
    assert "with 7 given facts by Global" in one.yaml()
    assert one.memory.peak < found.memory.peak, "planned for one layer, not for two"
    assert "rows were not kept" in one.yaml()


def test_layers_by_depth_where_the_budget_allows_no_trial(
    mixtral: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: Asked
) -> None:
    monkeypatch.setattr(locating, "_expected", lambda job, stage, unit: 1000.0 if stage == "trial" else 0.0)
    file = tmp_path / "my.yml"
    found = init(str(mixtral), "Global", load_facts(facts), file, locate=True, budget=0.5, progress=False)
    plain = init(str(mixtral), "Global", facts)
    assert found.hparams() == plain.hparams()
    by_depth = next(one.reason for one in plain.values if one.name == "layers")
    assert comment(file) == (
        f"{by_depth}; by depth, as no window could be tried within the budget of 0.5 min; rows: my.locate.json"
    )
    text = file.read_text(encoding="utf-8")
    assert "no edit was tried on it" in text
    assert "nothing was measured" not in text
    assert "No window was tried" not in text
    measured = Measured.read(tmp_path / "my.locate.json")
    assert measured.left["trial"] == 5
    assert quick[0][2].budget == 0.5


def test_what_is_wrong_is_said_before_anything_is_measured(
    mixtral: Path, facts: Path, tmp_path: Path, quick: Asked
) -> None:
    taken = tmp_path / "taken.locate.json"
    taken.write_text("mine")
    before = files_of(tmp_path)
    for changes, message in (
        ({"budget": 2.0}, "pass --locate with it"),
        ({"locate": True, "budget": 0.0}, "greater than 0"),
        ({"locate": True, "budget": float("nan")}, "greater than 0"),
        ({"locate": True, "out": tmp_path / "taken.yaml"}, r"taken.locate.json exists already"),
        ({"locate": True, "out": facts / "below" / "my.yaml"}, "can't be written"),
        ({"locate": True, "data": tmp_path / "none.csv"}, "none.csv"),
    ):
        with pytest.raises((DataError, WriteError), match=message):
            init(str(mixtral), **{"method": "Global", "data": facts, "out": tmp_path / "my.yaml", **changes})
    assert files_of(tmp_path) == before
    assert not quick
    init(str(mixtral), "Global", facts, tmp_path / "taken.yaml", force=True, locate=True, progress=False)
    assert Measured.read(taken).rows["trial"]


def test_a_failure_leaves_no_file(mixtral: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_of(tmp_path)

    def failing(*_: Any, **__: Any) -> Location:
        raise EditingError("singular")

    monkeypatch.setattr(locating, "locate", failing)
    with pytest.raises(EditingError, match="singular"):
        init(str(mixtral), "Global", facts, tmp_path / "my.yaml", locate=True)
    assert files_of(tmp_path) == before

    real = module.replacing

    @contextmanager
    def full(path: Path) -> Any:
        with real(path) as partial:
            if path.suffix == ".json":
                raise OSError("No space left")
            yield partial

    monkeypatch.setattr(locating, "locate", planted({(1,): 60.0}))
    monkeypatch.setattr(module, "replacing", full)
    with pytest.raises(WriteError, match="No space left"):
        init(str(mixtral), "Global", facts, tmp_path / "my.yaml", locate=True)
    assert files_of(tmp_path) == before


def test_names_of_the_rows() -> None:
    names = {"my.yaml": "my", "a.b.yml": "a.b", "v1.2": "v1.2", "my": "my"}
    assert {name: rows_file(f"there/{name}") for name in names} == {
        name: Path("there") / f"{stem}.locate.json" for name, stem in names.items()
    }


def test_the_command(mixtral: Path, facts: Path, tmp_path: Path, quick: Asked) -> None:
    arguments = ["init", "--model", str(mixtral), "--method", "MEMoE", "--data", str(facts), "--locate"]
    printed = CliRunner().invoke(app, [*arguments, "--budget", "5"])
    assert printed.exit_code == 0, printed.output
    assert len(yaml.safe_load(printed.stdout)["layers"]) == 1
    assert "Budget: 5 min." in printed.stderr
    written = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "my.yaml")])
    assert written.exit_code == 0, written.output
    assert "measured: window" in written.stdout
    assert "my.locate.json" in written.stderr
    wrong = CliRunner().invoke(app, ["init", "--model", str(mixtral), "--budget", "5"])
    assert wrong.exit_code == 2
    assert "--locate" in wrong.output
