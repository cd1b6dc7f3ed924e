"""Model entries, and whose choice every value of every shipped file is."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from easyedit_moe.commands.app import app
from easyedit_moe.errors import HyperParamsError, MethodError
from easyedit_moe.hparams import HYPERPARAMS, MoTEHyperParams, hparams_folder, load_hyperparams, presets
from easyedit_moe.hparams.sources import descriptions, origin, sourced_values, yaml_comments

SHIPPED = sorted(hparams_folder().glob("*/*.yaml"))
ENTRIES = sorted(hparams_folder().glob("*.yaml"))
WHOSE = re.compile(r"papers?|ours|EasyEdit|MoEEdit|UnKE|ROME|MEMIT|AlphaEdit|peft|arXiv", re.IGNORECASE)
OWN = [path for path in SHIPPED if path.parent.name in presets.METHODS]


def test_there_is_one_entry_per_model_and_one_file_per_method_and_model() -> None:
    models = {path.stem for path in ENTRIES}
    assert models == {"factworld", "gpt-oss-20b", "qwen3-30b-a3b", "qwen3.6-35b-a3b"}
    methods = {method.name for method in [*presets.own_methods(), *presets.host_methods()]}
    every = {(m, x) for m in methods for x in models} - {("WISE", "gpt-oss-20b")}  # whose o_proj has a bias
    assert {(path.parent.name, path.stem) for path in SHIPPED} == every


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_value_names_its_source(path: Path) -> None:
    found = sourced_values(path)
    assert len(found) > 10
    for item in found:
        if item.name not in ("alg_name", "model_name"):
            assert WHOSE.search(item.source), item


@pytest.mark.parametrize("path", OWN, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_file_says_only_what_differs(path: Path) -> None:
    hp, said = load_hyperparams(path), yaml.safe_load(path.read_text(encoding="utf-8"))
    assert said.pop("defaults") == f"../{path.stem}.yaml"
    entry = yaml.safe_load((hparams_folder() / f"{path.stem}.yaml").read_text(encoding="utf-8"))
    values = hp.to_dict()
    for name, value in said.items():
        assert values[name] == value
        plain = entry.get(name, presets.METHODS[hp.alg_name].get(name, vars(type(hp)).get(name)))
        assert name == "alg_name" or value != plain, f"{name} says what is known"
    known = {name: value for name, value in entry.items() if name in values and name not in said}
    assert {name: values[name] for name in known} == known
    assert known["model_name"] == hp.model_name


def test_every_default_is_described_with_its_source() -> None:
    for cls in HYPERPARAMS:
        described = descriptions(cls)
        assert set(described) == {item.name for item in fields(cls)}
        unsourced = [name for name, text in described.items() if not origin(text)]
        assert sorted(unsourced) == ["alg_name", "model_name"], cls


def test_values_say_where_they_come_from(tmp_path: Path) -> None:
    found = {item.name: item for item in sourced_values("MoTE/qwen3-30b-a3b")}
    assert (found["layers"].value, found["layers"].said_in, found["layers"].source) == (
        [3, 4, 5, 6, 7], "qwen3-30b-a3b.yaml", "papers",
    )  # fmt: skip
    assert (found["rank_out"].said_in, found["rank_out"].source) == ("MoTE/qwen3-30b-a3b.yaml", "ours")
    assert (found["batch_size"].said_in, found["batch_size"].source) == ("default", "Papers: 50.")
    fixed = {item.name: item for item in sourced_values("MoE-ROME/gpt-oss-20b")}["edits_per_solve"]
    assert (fixed.value, fixed.said_in) == (1, "the method")
    file = tmp_path / "mine.yaml"
    file.write_text('alg_name: MoTE\nmodel_name: m\nlayers: [1]\nstats_dir: "a#b"  # mine\n', encoding="utf-8")
    assert yaml_comments(file)["layers"] == ""
    assert {item.name: item.value for item in sourced_values(file)}["stats_dir"] == "a#b"


def test_the_command_shows_the_resolved_whole() -> None:
    shown = CliRunner().invoke(app, ["methods", "--show", "MoTE/qwen3-30b-a3b"])
    assert shown.exit_code == 0
    for name in (item.name for item in fields(MoTEHyperParams)):
        assert name in shown.output
    assert "papers" in shown.output
    theirs = CliRunner().invoke(app, ["methods", "--show", "ROME/factworld"])
    assert "rewrite_module_tmp" in theirs.output
    wrong = CliRunner().invoke(app, ["methods", "--show", "MoTE/qwen3-30b-a3c"])
    assert wrong.exit_code == 2
    listed = CliRunner().invoke(app, ["methods"]).output
    assert all(method.name in listed for method in [*presets.own_methods(), *presets.host_methods()])


@pytest.mark.parametrize(
    ("shared", "own", "error", "message"),
    [
        ("v_Ir: 0.1\n", "alg_name: MoTE\n", HyperParamsError, r"no method has a key 'v_Ir'\. Did you mean 'v_lr'"),
        (None, "alg_name: MoTE\n", HyperParamsError, r"defaults names 'shared\.yaml', but neither"),
        ("- 1\n", "alg_name: MoTE\n", HyperParamsError, "must hold a mapping"),
        ("layers: [1]\n", "alg_name: MoTEE\n", MethodError, "Did you mean 'MoTE'"),
        ("layers: [1]\n", "alg_name: MoTE\nexperts: all\n", HyperParamsError, "unknown key 'experts'"),
        ("layers: [3, 1]\n", "alg_name: MoTE\n", HyperParamsError, "layers must be increasing"),
    ],
)
def test_unusable_defaults(shared: str | None, own: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / "MoTE").mkdir()
    if shared is not None:
        (tmp_path / "MoTE" / "shared.yaml").write_text(shared, encoding="utf-8")
    file = tmp_path / "MoTE" / "model.yaml"
    file.write_text(f"defaults: shared.yaml\nmodel_name: m\n{own}", encoding="utf-8")
    with pytest.raises(error, match=message):
        load_hyperparams(file)


def test_keys_that_only_other_methods_have_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "shared.yaml").write_text("layers: [1]\nnum_passes: 7\nlambda_reg: 3\n", encoding="utf-8")
    file = tmp_path / "h.yaml"
    file.write_text("defaults: shared.yaml\nalg_name: MoE-FT\nmodel_name: m\n", encoding="utf-8")
    assert load_hyperparams(file).layers == [1]
    assert load_hyperparams(file, layers=[2]).layers == [2]
    file.write_text("defaults: shared.yaml\nalg_name: MoEEdit-BCD\nmodel_name: m\nlambda_reg: 4\n", encoding="utf-8")
    bcd = load_hyperparams(file)
    assert (bcd.num_passes, bcd.lambda_reg) == (7, 4.0)


def test_a_copied_file_still_finds_its_models_entry(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text((hparams_folder() / "MoTE" / "qwen3-30b-a3b.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert load_hyperparams(file) == load_hyperparams("MoTE/qwen3-30b-a3b")
