"""A checkpoint with modelling code of its own, from loading to an edited checkpoint, and nothing of it untrusted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from own_code import module_cache, write_checkpoint
from tiny import assert_same_state, facts, requests, state_of, tiny_tokenizer
from torch import nn
from typer.testing import CliRunner

from benchmarks.families import planned_error
from easyedit_moe import MoEEditor
from easyedit_moe.checkpoints.shards import Checkpoint
from easyedit_moe.commands.app import app
from easyedit_moe.editors import make_editor
from easyedit_moe.errors import DataError
from easyedit_moe.hparams import hyperparams_class
from easyedit_moe.hparams.sites import SITES
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.loading import load_model
from easyedit_moe.moe.probe import check_keys, measured_tail

pytestmark = pytest.mark.filterwarnings("ignore::easyedit_moe.errors.EditingWarning")
IDS = tiny_tokenizer()("The quick brown fox jumps over the lazy dog.")["input_ids"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The checkpoint; its code is copied to a cache of modules of this test alone."""
    place = tmp_path_factory.mktemp("own")
    with module_cache(place / "modules"):
        yield write_checkpoint(place / "model")


@pytest.fixture
def model(folder: Path) -> nn.Module:
    return load_model(str(folder), "float32", trust_remote_code=True)[0]


def hparams(folder: Path, method: str, **changes: Any) -> Any:
    values = {
        "alg_name": method, "model_name": str(folder), "layers": [1, 2], "dtype": "float32", "v_num_grad_steps": 3,
        "metric": "identity", "lambda_reg": 1e-3, "trust_remote_code": True,
    }  # fmt: skip
    if method == "MoTE":
        values |= {"whitening": "none", "rank_expert": 8}
    return hyperparams_class(method).from_dict(values | changes)


@pytest.mark.parametrize("site", SITES)
def test_sums_and_planned_changes_are_the_models_own(site: str, model: nn.Module) -> None:
    before, view = state_of(model), MoELayerView(model, site=site)
    assert sorted(view.layers) == ([0] if site == "dense" else [1, 2, 3])
    tails = {layer: measured_tail(view, layer, IDS, 0) for layer in view.layers}
    assert {tail.kind for tail in tails.values()} == {"identity"}
    assert max(check_keys(view, layer, IDS, 0) for layer in view.layers) < 1e-5
    last = max(view.layers)
    assert planned_error(view, last, tails[last], tiny_tokenizer())[1] < 1e-3
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("method", ["Global", "MoTE"])
def test_the_flag_in_the_hparams_lets_it_be_edited(method: str, folder: Path) -> None:
    settings = hparams(folder, method)
    host = MoEEditor.from_hparams(settings)
    before = state_of(host.model)
    result = make_editor(settings, progress=False).edit(host.model, host.tok, facts(2))
    after = state_of(host.model)["parameters"]
    changed = {name for name, value in before["parameters"].items() if not torch.equal(value, after[name])}
    assert {name.split(".")[2] for name in changed} == {"1", "2"}
    assert all(".mlp.experts." in name and name.endswith("down_proj.weight") for name in changed)
    assert all(fact.residual_share == pytest.approx(1, abs=0.05) for fact in result.diagnosis.facts)
    result.patch.revert(host.model)
    assert_same_state(before, state_of(host.model))


def test_it_goes_through_the_commands(folder: Path, tmp_path: Path) -> None:
    table, settings = tmp_path / "facts.csv", tmp_path / "my.yaml"
    rows = [f"{fact['prompt']},{fact['subject']},{fact['target_new']}" for fact in requests(2)]
    table.write_text("\n".join(["prompt,subject,target_new", *rows]), encoding="utf-8")
    hparams(folder, "Global").to_yaml(settings)
    run = ["edit", str(table), "--model", str(folder), "--hparams", str(settings), "--out", str(tmp_path / "out"),
           "--save", "patch", "--save", "checkpoint", "--trust-remote-code"]  # fmt: skip
    result = CliRunner().invoke(app, run, input="y\n")
    assert result.exit_code in (0, 3), result.output  # 3: no answer changed, which is no wonder at random weights
    patch = tmp_path / "out" / "patch.safetensors"
    for command in (["apply", str(patch), "--model", str(folder), "--out", str(tmp_path / "applied")],
                    ["revert", str(patch), "--model", str(tmp_path / "applied"), "--base", str(folder), "--out",
                     str(tmp_path / "back")]):  # fmt: skip
        untrusted = CliRunner().invoke(app, command, input="y\n")
        assert untrusted.exit_code == 2
        assert "--trust-remote-code" in untrusted.output.replace("\n", "")
        result = CliRunner().invoke(app, [*command, "--trust-remote-code"], input="y\n")
        assert result.exit_code == 0, result.output
    stored, applied, back, source = (
        Checkpoint.of_folder(one)
        for one in (tmp_path / "out" / "checkpoint", tmp_path / "applied", tmp_path / "back", folder)
    )
    assert all(torch.equal(stored.read(name), applied.read(name)) for name in source.tensors)
    assert any(not torch.equal(source.read(name), applied.read(name)) for name in source.tensors)
    assert all(torch.equal(source.read(name), back.read(name)) for name in source.tensors)
    assert (tmp_path / "out" / "checkpoint" / "modeling_tiny_k2.py").is_file()


UNTRUSTED = {
    "load": lambda folder: load_model(str(folder)),
    "editor": lambda folder: MoEEditor.from_hparams(hparams(folder, "Global", trust_remote_code=False)),
}


@pytest.mark.parametrize("way", UNTRUSTED)
def test_without_the_flag_it_is_refused(way: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("a question on standard input")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(DataError, match=r"code of its own.*trust_remote_code: true"):
        UNTRUSTED[way](folder)


def test_a_yes_on_standard_input_lets_nothing_run(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "edit.py"
    script.write_text(
        "import sys\n"
        "from easyedit_moe import MoEEditor\n"
        "from easyedit_moe.hparams import load_hyperparams\n"
        "try:\n"
        "    MoEEditor.from_hparams(load_hyperparams(sys.argv[1]))\n"
        "finally:\n"
        "    print('left:', sys.stdin.read())\n",
        encoding="utf-8",
    )
    hparams(folder, "Global", trust_remote_code=False).to_yaml(tmp_path / "my.yaml")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "my.yaml")],
        input="y\ny\n", capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "left: y\ny\n" in done.stdout
    assert "trust_remote_code: true" in done.stderr.strip().splitlines()[-1]
    assert not list((tmp_path / "modules").rglob("*tiny_k2*"))
