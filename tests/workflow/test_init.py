"""Hyper-parameters for models that no YAML is for: chosen from the config, and good enough to edit with."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from edited_folders import model_of, saved
from tiny import requests, state_of, tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from easyedit_moe import MoEEditor
from easyedit_moe.commands.app import app
from easyedit_moe.comparison.settings import loading_settings, resolve_hparams, resolve_methods
from easyedit_moe.errors import DataError, DenseModelError, EditingWarning, HyperParamsError, LayerError, MethodError
from easyedit_moe.facts.records import load_facts
from easyedit_moe.hparams import load_hyperparams, presets
from easyedit_moe.hparams.sources import sourced_values
from easyedit_moe.moe.loading import load_model
from easyedit_moe.workflow.edit import edit
from easyedit_moe.workflow.init import init

OTHER_FAMILIES = {
    "mixtral": "MoTE", "olmoe": "Global", "qwen2_moe": "MoEEdit-BCD", "deepseek_v3": "MoE-AlphaEdit",
    "granitemoe": "MoTE", "glm4_moe": "BCD+speedup", "nemotron_h": "Global+speedup", "laguna": "MoE-ROME",
    "old_style": "UnKE", "multimodal qwen3_vl_moe": "MoE-FT", "omni": "Global",
}  # fmt: skip
"""Families that no YAML names, each with a method to edit it by."""
QUICK: dict[str, Any] = {
    "v_num_grad_steps": 3, "generated_length": 6, "mom2_n_samples": 64, "optim_num_step": 3, "num_steps": 3,
    "preserve_n_samples": 3, "lambda_reg": 0.01, "nullspace_threshold": 0.5, "nullspace_relative": True,
}  # fmt: skip


def facts_file(folder: Path, count: int = 2) -> Path:
    file = folder / "facts.csv"
    rows = [",".join((r["prompt"], r["subject"], r["target_new"])) for r in requests(count)]
    file.write_text("\n".join(["prompt,subject,target_new", *rows]), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model") / "my-mixtral", model_of("mixtral"))


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_init_and_edit(family: str, tmp_path: Path) -> None:
    folder, file = saved(tmp_path / "checkpoint", model_of(family, torch.float32)), facts_file(tmp_path)
    found = init(str(folder), OTHER_FAMILIES[family], file, tmp_path / "my.yaml")
    settings = load_hyperparams(tmp_path / "my.yaml")
    assert settings == found.hparams()
    assert (settings.dtype, settings.batch_size, settings.model_name) == ("float32", 2, str(folder))
    model, tok = load_model(str(folder), "float32")
    before = state_of(model)["parameters"]
    quick = {name: value for name, value in QUICK.items() if hasattr(settings, name)}
    fixed = presets.find_method(settings.alg_name).fixed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)
        report = edit(
            file, (model, tok), hparams=tmp_path / "my.yaml", progress=False, max_new_tokens=1,
            overrides={**{n: v for n, v in quick.items() if n not in fixed}, "stats_dir": str(tmp_path / "stats")},
        )  # fmt: skip
    after = state_of(model)["parameters"]
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert len(report.facts) == 2
    assert changed
    layers = {f".{layer}." for layer in settings.layers}
    assert all(any(part in name for part in layers) for name in changed), changed
    report.patches[0].revert(model)
    assert all(torch.equal(value, before[name]) for name, value in state_of(model)["parameters"].items())


@pytest.mark.parametrize("method", [row.name for row in presets.own_methods()])
def test_every_method_and_every_value_has_a_reason(method: str, mixtral: Path, tmp_path: Path) -> None:
    found = init(str(mixtral), method, None, tmp_path / "my.yaml")
    text = (tmp_path / "my.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    assert text == found.yaml()
    assert values["alg_name"] == method
    for name in values.keys() - {"alg_name", "model_name"}:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name}:")]
        assert len(line.partition("  # ")[2]) > 3, line
    assert "mixtral: 4 layers, experts in 4 of them; E = 8, K = 2, d = 32, h = 24." in text
    assert "Planned memory: " in text
    assert "wikipedia" not in text.lower()
    shown = {one.name: one for one in sourced_values(tmp_path / "my.yaml")}
    assert "of 4 layers" in shown["layers"].source


def test_a_loaded_model_and_commands_use_it_and_say_so(
    mixtral: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = resolve_methods(["MoTE", "Global", "MoE-FT"], str(mixtral), None, {"model_name": str(mixtral)})
    assert [hp.layers for hp in found] == [[0, 1, 2], [0, 1, 2], [2]]
    assert len(caplog.records) == 1, "one line for all methods"
    assert f"No hparams ship for {mixtral}, so they are chosen from its config" in caplog.text
    done = CliRunner().invoke(
        app, ["edit", str(facts_file(tmp_path)), "--model", str(mixtral), "--out", str(tmp_path / "out"), "--dry-run"]
    )
    assert done.exit_code == 0, done.output
    assert "layers 0, 1, 2, bfloat16 on" in done.output
    model, tok = tiny_model("olmoe"), tiny_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)
        report = edit(
            load_facts(facts_file(tmp_path)), (model, tok), "MoE-FT", overrides={"num_steps": 1}, progress=False
        )
    assert report.provenance["hparams"]["layers"] == [2]


def test_overrides_count_more_and_are_checked(mixtral: Path) -> None:
    found = resolve_hparams("MoTE", str(mixtral), None, {"layers": [1], "rank_in": 3, "lr": 0.5})
    assert (found.layers, found.rank_in) == ([1], 3)
    with pytest.raises(HyperParamsError, match="unknown key 'no_such'"):
        resolve_hparams("MoTE", str(mixtral), None, {"no_such": 1})


def test_a_model_named_like_one_that_ships_but_of_other_sizes(tmp_path: Path) -> None:
    folder = saved(tmp_path / "Qwen3-30B-A3B-pruned", model_of("qwen3_moe"))
    assert resolve_hparams("Global", str(folder), None, {}).layers == [0, 1, 2]
    assert loading_settings([], str(folder)).layers == [0, 1, 2]


def test_the_stand_alone_editor_takes_a_model_instead_of_a_yaml(mixtral: Path) -> None:
    editor = MoEEditor.from_hparams(f"MoTE/{mixtral}")
    assert (editor.hparams.alg_name, editor.hparams.layers) == ("MoTE", [0, 1, 2])
    with pytest.raises(HyperParamsError, match="does not exist"):
        MoEEditor.from_hparams("nothing/of.yaml")


def test_facts_decide_on_batch_and_fact_token(mixtral: Path, tmp_path: Path) -> None:
    many = tmp_path / "many.csv"
    rows = [f"Person {n} lives in,Person {n},Rome" for n in range(60)]
    many.write_text("\n".join(["prompt,subject,target_new", *rows]), encoding="utf-8")
    found = init(str(mixtral), "Global", many)
    assert found.hparams().remember_edits
    assert found.hparams().batch_size == 50
    assert not init(str(mixtral), "MoE-FT", many).notes
    nameless = tmp_path / "nameless.csv"
    nameless.write_text("prompt,target_new\nThe sky is,green\nThe sea is,red", encoding="utf-8")
    found = init(str(mixtral), "Global", nameless)
    assert (found.hparams().fact_token, found.hparams().batch_size) == ("last", 2)
    assert "name no subject" in init(str(mixtral), "MEMoE", nameless).notes[0]


@pytest.mark.parametrize(
    ("family", "site", "layers"),
    [
        ("qwen2_moe", "shared_expert", [0, 1, 2]),
        ("deepseek_v3", "dense", [0]),
        ("deepseek_v3", "shared_expert", [1, 2]),
    ],
)
def test_another_site(family: str, site: str, layers: list[int], tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", model_of(family))
    result = CliRunner().invoke(
        app, ["init", "--model", str(folder), "--method", "MoTE", "--site", site, "-o", str(tmp_path / "my.yaml")]
    )
    assert result.exit_code == 0, result.output
    settings = load_hyperparams(tmp_path / "my.yaml")
    assert (settings.site, settings.layers, settings.expert_rank) == (site, layers, 1)
    assert f"site: {site}  # asked for" in (tmp_path / "my.yaml").read_text()


def test_refused_sites(mixtral: Path) -> None:
    with pytest.raises(HyperParamsError, match="MoE-FT has no setting site"):
        init(str(mixtral), "MoE-FT", site="shared_expert")
    with pytest.raises(HyperParamsError, match="one of experts, shared_expert, dense; found 'all'"):
        init(str(mixtral), site="all")
    with pytest.raises(LayerError, match="no layer of this model has one"):
        init(str(mixtral), site="dense")
    with pytest.raises(DataError, match="routed experts only"):
        init(str(mixtral), site="dense", locate=True)


def test_refusals(mixtral: Path, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        init(str(mixtral), "Global", None, file)
    assert file.read_text() == "mine"
    init(str(mixtral), "Global", None, file, force=True)
    assert "alg_name: Global" in file.read_text()
    with pytest.raises(DataError, match="exists already"):
        init(str(mixtral), "Global", None, tmp_path, force=True)
    with pytest.raises(MethodError, match="Did you mean 'MoTE'"):
        init(str(mixtral), "MoTEE")
    with pytest.raises(DataError, match="can't be loaded"):
        init(str(tmp_path / "nothing"))
    with pytest.raises(DenseModelError, match="no experts in any"):
        init(str(saved(tmp_path / "dense", model_of("dense"))))


def test_the_command_prints_or_writes(mixtral: Path, tmp_path: Path) -> None:
    arguments = ["init", "--model", str(mixtral), "--method", "MoTE"]
    printed = CliRunner().invoke(app, arguments)
    assert printed.exit_code == 0, printed.output
    assert yaml.safe_load(printed.stdout)["rank_expert"] == 8
    written = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "new" / "my.yaml")])
    assert written.exit_code == 0, written.output
    assert "MoTE on" in written.stdout
    assert (tmp_path / "new" / "my.yaml").read_text(encoding="utf-8").splitlines() == printed.stdout.splitlines()
    again = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "new" / "my.yaml")])
    assert again.exit_code == 2
