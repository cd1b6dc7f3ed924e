"""The tables of the paper: the documentation's line for each real model, run on a tiny one of that name."""

from __future__ import annotations

import json
import re
import shlex
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from record_files import ZSRE
from tiny import CONFIGS, TEXTS, randomise, tiny_tokenizer
from tiny_comparison import tiny_records
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from easyedit_moe import host
from easyedit_moe.commands.app import app
from easyedit_moe.comparison import compare as comparing
from easyedit_moe.comparison.paper_report import markdown
from easyedit_moe.comparison.papers import TABLES
from easyedit_moe.comparison.saved import read_results
from easyedit_moe.facts.records import load_records
from easyedit_moe.hparams import models, presets
from easyedit_moe.statistics.corpus import corpus_hash
from easyedit_moe.workflow.tables import _plan, _tell_of_shipped

PAGE = Path(__file__).parents[2] / "docs" / "tables.md"
FAMILIES = {"Qwen3-30B-A3B": "qwen3_moe", "gpt-oss-20b": "gpt_oss", "Qwen3.6-35B-A3B": "qwen3_5_moe"}
TINY = {
    "device": "cpu", "dtype": "float32", "v_num_grad_steps": 1, "num_steps": 3, "num_updates": 2, "optim_num_step": 1,
    "steps": 1, "mom2_n_samples": 8, "preserve_n_samples": 2, "locality_n_samples": 2, "rank_expert": 4,
    "rank_out": 16, "rank_in": 8,
}  # fmt: skip
"""What a tiny model can't have as the real ones do: their device, sizes and time."""


def lines_of_the_page() -> dict[str, str]:
    """Command by model."""
    lines = re.findall(r"^easyedit-moe tables .*--model /models/.*$", PAGE.read_text(encoding="utf-8"), re.M)
    return {re.search(r"/models/(\S+)", line)[1]: line for line in lines}


def tiny_checkpoint(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of the architecture in a folder of the real one's name, which then counts as the real one."""
    old = CONFIGS[FAMILIES[name]]().to_dict()
    kinds = {"layer_types": old["layer_types"] * 2} if "linear_attention" in old.get("layer_types", []) else {}
    left_out = ("layer_types", "num_hidden_layers")
    config = CONFIGS[FAMILIES[name]]().__class__(
        **{key: value for key, value in old.items() if key not in left_out}, num_hidden_layers=8, **kinds
    )
    model = AutoModelForCausalLM.from_config(config)
    randomise(model)
    model.save_pretrained(folder / name)
    tiny_tokenizer().save_pretrained(folder / name)
    monkeypatch.setitem(models.OUTLINES, name.lower(), models.outline(config.to_dict()))


def run(line: str, folder: Path, *more: str) -> Result:
    """A line of the page on what lies in the folder, with the settings of tiny models."""
    arguments = shlex.split(line)[1:]
    for option, value in {"--data": "data.json", "--zsre": "zsre.json", "--out": "out", "--edits": ""}.items():
        if option in arguments:
            arguments[arguments.index(option) + 1] = str(folder / value) if value else "2"
    place = arguments.index("--model") + 1
    arguments[place] = str(folder / Path(arguments[place]).name)
    corpus = dict.fromkeys(("mom2_dataset", "preserve_dataset", "locality_dataset"), folder / "corpus.txt")
    settings = [f"{key}={value}" for key, value in {**TINY, **corpus}.items()]
    command = [*arguments, "--stats-dir", str(folder / "stats"), "--hparams", str(folder / "hparams"), *more]
    return CliRunner().invoke(app, ["-q", *command, *(part for text in settings for part in ("--set", text))])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data.json").write_text(json.dumps(tiny_records(2)), encoding="utf-8")
    records = [ZSRE, {**ZSRE, "subject": "Lyon", "src": "Where is Lyon?"}]
    (tmp_path / "zsre.json").write_text(json.dumps(records), encoding="utf-8")
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    # The real ones have these at layers that the tiny ones lack: half-way up, and all of them.
    for (method, layers), name in product({"MEMoE": [3], "AdaLoRA": list(range(8))}.items(), FAMILIES):
        file = tmp_path / "hparams" / method / f"{name.lower()}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump({"alg_name": method, "model_name": name, "layers": layers}))
    return tmp_path


@pytest.fixture
def no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "is_available", lambda: False)


def saved(folder: Path, table: str) -> dict[str, Any]:
    return json.loads((folder / "out" / f"table-{table}" / "results.json").read_text(encoding="utf-8"))


def rows_of(folder: Path, table: str) -> list[str]:
    return [row["method"] for row in saved(folder, table)["rows"]]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_has_hparams_for_the_real_models(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(folder, name, monkeypatch)
    monkeypatch.setattr(host, "is_available", lambda: True)
    for table in TABLES.values():
        plan = _plan(table, str(folder / name), None, {})
        left_out = [line.partition(":")[0] for line in plan.left_out]
        assert left_out == (["WISE"] if (name, table.name) == ("gpt-oss-20b", "1") else []), "no file ships for it"
        assert [*plan.labels, *left_out] != []
        assert {line.label for line in table.lines} == {*plan.labels, *left_out}
        paper = [hp for label, hp in zip(plan.labels, plan.settings, strict=True) if label == "MoTE (paper)"]
        assert all((hp.spread, hp.whitening, hp.metric) == ("update", "in", "nullspace") for hp in paper)


@pytest.mark.parametrize(
    ("name", "run_here"), [("Qwen3-30B-A3B", ("1",)), ("gpt-oss-20b", ("2", "5")), ("Qwen3.6-35B-A3B", ("4",))]
)
def test_the_line_of_each_real_model(
    name: str, run_here: tuple[str, ...], folder: Path, no_host: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint(folder, name, monkeypatch)
    line = lines_of_the_page()[name]
    assert line.startswith("easyedit-moe tables 1 2 4 5 6 ")
    done = run(line.replace("1 2 4 5 6", " ".join(run_here)), folder)
    assert done.exit_code == 0, done.output
    for number in run_here:
        table, found = TABLES[number], saved(folder, number)
        wanted = [line.label for line in table.lines if presets.find_method(line.method).host_name is None]
        assert [row["method"] for row in found["rows"]] == ["pre-edit", *wanted]
        assert found["state"] == "complete"
        about = found["provenance"]
        assert (about["table"], about["published"]) == (number, None), "two edits are not the paper's thousand"
        assert about.get("ready_targets", False) is table.ready_targets
        assert [line.partition(":")[0] for line in about["left_out"]] == [
            line.label for line in table.lines if line.label not in wanted
        ]
        place = folder / "out" / f"table-{number}"
        text = (place / "table.md").read_text(encoding="utf-8")
        assert text == markdown(read_results(place / "results.json"))
        assert text in (folder / "out" / "tables.md").read_text(encoding="utf-8")
        assert (place / "comparison.png").read_bytes().startswith(b"\x89PNG")
    if "1" in run_here:
        other = saved(folder, "1-zsre")
        assert other["provenance"]["protocol"].startswith("zsre")
        assert [row["method"] for row in other["rows"]] == rows_of(folder, "1")
        assert "Left out: ROME: EasyEdit is not installed" in done.stdout
    if "5" in run_here:
        seconds = {row["method"]: row["seconds"] for number in run_here for row in saved(folder, number)["rows"]}
        assert seconds["update (paper), whitening in"] == seconds["MoTE (paper)"], "one row for both tables"
        assert seconds["update (paper), whitening none"] != seconds["MoTE (paper)"]
    if "4" in run_here:
        assert "edit, early 1-2" in done.stdout


def test_rows_are_kept_for_the_next_run(
    folder: Path, no_host: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_checkpoint(folder, "Qwen3-30B-A3B", monkeypatch)
    line = lines_of_the_page()["Qwen3-30B-A3B"]
    made: list[str] = []
    original = comparing._run_method

    def count(judge: Any, hparams: Any, label: str, targets: Any) -> Any:
        if label == "MoTE (paper), without" and not made.count("stopped"):
            made.append("stopped")
            raise KeyboardInterrupt
        made.append(label)
        return original(judge, hparams, label, targets)

    monkeypatch.setattr(comparing, "_run_method", count)
    one = line.replace("1 2 4 5 6", "6")
    assert run(one, folder).exit_code == 130
    assert rows_of(folder, "6") == ["pre-edit", *made[:-1]]
    assert saved(folder, "6")["state"] == "interrupted"
    with caplog.at_level("INFO", logger="easyedit_moe.workflow.tables"):
        done = run(one, folder, "--resume")
    assert done.exit_code == 0, done.output
    labels = [row.label for row in TABLES["6"].lines]
    at = labels.index("MoTE (paper), without")
    assert f"Going on after {at + 1} rows of" in caplog.text
    assert made == [*labels[:at], "stopped", *labels[at:]]
    assert rows_of(folder, "6") == ["pre-edit", *labels]


def test_records_are_left_out_at_the_start(folder: Path, no_host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(folder, "Qwen3-30B-A3B", monkeypatch)
    line = lines_of_the_page()["Qwen3-30B-A3B"].replace("1 2 4 5 6", "6")
    (folder / "data.json").write_text(json.dumps(tiny_records(3)), encoding="utf-8")
    done = run(line, folder, "--skip", "1")
    assert done.exit_code == 0, done.output
    about = saved(folder, "6")["provenance"]
    assert (about["skip"], about["edits"]) == (1, 2)
    later = load_records(str(folder / "data.json")).records[1:]
    assert about["data_hash"] == corpus_hash([repr(record) for record in later])
    done = run(line, folder, "--skip", "2")
    assert done.exit_code == 2
    assert "were asked for" in " ".join(done.stderr.split())


def test_methods_that_a_folder_lacks_have_what_ships(
    folder: Path, no_host: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_checkpoint(folder, "gpt-oss-20b", monkeypatch)
    place = folder / "hparams" / "MoTE" / "gpt-oss-20b.yaml"
    place.parent.mkdir()
    place.write_text(yaml.safe_dump({"alg_name": "MoTE", "model_name": "any", "layers": [1, 2], "lambda_reg": 7.0}))
    model = str(folder / "gpt-oss-20b")
    found = _plan(TABLES["2"], model, folder / "hparams", {"lambda_reg": 9.0})
    assert {hp.lambda_reg for hp in found.settings} == {9.0}, "overrides count more than any file"
    found = _plan(TABLES["2"], model, folder / "hparams", {})
    by_label = dict(zip(found.labels, found.settings, strict=True))
    assert (by_label["MoTE (paper)"].lambda_reg, by_label["MoTE (paper)"].layers) == (7.0, [1, 2])
    assert (by_label["MoTE (paper)"].spread, by_label["MoTE, residual"].spread) == ("update", "residual")
    assert (by_label["Global"].lambda_reg, by_label["Global"].layers) == (1.0, [3, 4, 5])
    plans = [found, _plan(TABLES["1"], model, folder / "hparams", {})]
    assert any("EasyEdit is not installed" in reason for reason in plans[1].left_out)
    _tell_of_shipped(plans, model, folder / "hparams")
    (said,) = caplog.messages
    assert "no file for MoEEdit-BCD, BCD+speedup, Global, Global+speedup, MoE-FT," in said
    assert not {"FT", "ROME", "MEMIT", "WISE"} & set(said.partition(" on ")[0].replace(",", "").split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["3"], "There is no table '3'. There are 1, 2, 4, 5, 6, ablations."),
        (["ablation"], "Did you mean 'ablations'?"),
        (["2", "--hparams", str(PAGE)], "--hparams must be a folder"),
        (["2", "--set", "spred=once"], "unknown key 'spred'"),
        (["2", "--edits", "100000"], "were asked for"),
    ],
)
def test_bad_input_is_explained(more: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["tables", *more, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert not list(tmp_path.rglob("results.json"))
