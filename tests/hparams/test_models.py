"""Which hparams a model of another name gets."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from easyedit_moe.comparison.settings import hparams_file, resolve_hparams, resolve_methods
from easyedit_moe.errors import HyperParamsError
from easyedit_moe.hparams import hparams_folder
from easyedit_moe.hparams.models import OUTLINES, config_outline, model_file

SHIPPED = hparams_folder() / "MoTE"
QWEN = {"model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "num_experts": 128,
        "moe_intermediate_size": 768, "intermediate_size": 6144}  # fmt: skip
GPT = {"model_type": "gpt_oss", "num_hidden_layers": 24, "hidden_size": 2880, "num_local_experts": 32,
       "intermediate_size": 2880}  # fmt: skip
MULTIMODAL = {"model_type": "qwen3_5_moe", "vision_config": {"hidden_size": 1152}, "text_config": {
    "model_type": "qwen3_5_moe_text", "num_hidden_layers": 40, "hidden_size": 2048, "num_experts": 256,
    "moe_intermediate_size": 512}}  # fmt: skip


def folder(path: Path, config: dict[str, Any]) -> str:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def stem(model_name: str, where: Path = SHIPPED) -> str | None:
    found, _ = model_file(where, model_name)
    return None if found is None else found.stem


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-30B-A3B-Base", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-30B-A3B-Thinking-2507", "qwen3-30b-a3b"),
        ("someone/My_Qwen3_30B_A3B", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-30B", "qwen3-30b-a3b"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("unsloth/gpt-oss-20b-BF16", "gpt-oss-20b"),
        ("Qwen/Qwen3.6-35B-A3B-FP8", "qwen3.6-35b-a3b"),
        ("factworld", "factworld"),
        ("openai/gpt-oss-120b", None),
        ("openai/gpt-oss", None),
        ("Qwen/Qwen3", None),
        ("Qwen/Qwen3-235B-A22B", None),
        ("Qwen/Qwen3-30B-A3B0", None),
        ("xQwen3-30B-A3B", None),
    ],
)
def test_names(name: str, found: str | None) -> None:
    assert stem(name) == found


@pytest.mark.parametrize(
    ("config", "found"),
    [(QWEN, "qwen3-30b-a3b"), (GPT, "gpt-oss-20b"), (MULTIMODAL, "qwen3.6-35b-a3b"),
     (MULTIMODAL["text_config"], "qwen3.6-35b-a3b")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["checkpoint-500", "Qwen3-30B-A3B-Instruct-2507", "gpt-oss-20b"])
def test_a_folder_is_known_by_its_config_whatever_its_name(
    tmp_path: Path, config: dict[str, Any], found: str, name: str
) -> None:
    path = folder(tmp_path / name, config)
    assert stem(path) == stem(path + "/") == found


@pytest.mark.parametrize("change", [{"num_hidden_layers": 36}, {"hidden_size": 2880}, {"num_experts": 64},
                                    {"moe_intermediate_size": 512}, {"model_type": "mixtral"}])  # fmt: skip
def test_a_folder_of_another_architecture_or_size_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    named = folder(tmp_path / "Qwen3-30B-A3B-Base", QWEN | change)
    ((key, value),) = change.items()
    with pytest.raises(HyperParamsError, match=f"config.json says {key} {value}, not {OUTLINES['qwen3-30b-a3b'][key]}"):
        hparams_file("MoTE", named)
    with pytest.raises(HyperParamsError, match="has its name or its architecture"):
        hparams_file("MoTE", folder(tmp_path / "other", QWEN | change))
    file = hparams_folder() / "MoTE" / "qwen3-30b-a3b.yaml"
    assert hparams_file("MoTE", named, file) == file, "a file that is named is used"


def test_what_is_no_config_decides_nothing(tmp_path: Path) -> None:
    broken = folder(tmp_path / "Qwen3-30B-A3B-x", QWEN)
    for text in ("{", "[]", "{}"):
        (Path(broken) / "config.json").write_text(text)
        assert config_outline(broken) == {}
        assert stem(broken) == "qwen3-30b-a3b"


def test_the_line_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder(tmp_path / "checkpoint-500", QWEN)
    with caplog.at_level(logging.WARNING):
        found = resolve_methods(["MoTE", "Global", "MoE-FT"], path, None, {"model_name": path})
    assert [hp.layers for hp in found] == [[3, 4, 5, 6, 7], [3, 4, 5, 6, 7], [7]]
    assert [r.getMessage() for r in caplog.records] == [
        f"{path} gets the hparams of qwen3-30b-a3b, by its architecture and sizes."
    ]
    caplog.clear()
    resolve_hparams("MoTE", "Qwen/Qwen3-30B-A3B-Base", None, {})
    assert "gets the hparams of qwen3-30b-a3b, by its name" in caplog.text
    caplog.clear()
    resolve_hparams("MoTE", "Qwen/Qwen3-30B-A3B", None, {})
    assert caplog.text == ""


def own_files(tmp_path: Path, *names: str) -> Path:
    where = tmp_path / "mine" / "MoTE"
    where.mkdir(parents=True)
    for number, name in enumerate(names):
        values = {"alg_name": "MoTE", "model_name": "m", "layers": [number]}
        (where / name).write_text(yaml.safe_dump(values))
    return where.parent


@pytest.mark.parametrize("suffix", ["yaml", "yml", "conf", "json", "YAML"])
def test_any_suffix_is_read(tmp_path: Path, suffix: str) -> None:
    mine = own_files(tmp_path, f"model.{suffix}")
    assert resolve_hparams("MoTE", "model", mine, {}).layers == [0]
    assert resolve_hparams("MoTE", "whatever", mine / "MoTE" / f"model.{suffix}", {}).layers == [0]


def test_nearest_name_and_first_suffix_win(tmp_path: Path) -> None:
    mine = own_files(
        tmp_path, "qwen3-30b-a3b.yml", "qwen3-30b-a3b.yaml", "qwen3-30b-a3b-base.yaml", "other-7b-base.yaml"
    )
    assert resolve_hparams("MoTE", "Qwen/Qwen3-30B-A3B", mine, {}).layers == [1]
    assert resolve_hparams("MoTE", "Qwen/Qwen3-30B-A3B-Base", mine, {}).layers == [2]
    assert resolve_hparams("MoTE", "Qwen/Qwen3-30B-A3B-Base-2507", mine, {}).layers == [2]
    assert resolve_hparams("MoTE", "Qwen/Qwen3-30B-A3B-Chat", mine, {}).layers == [1]
    assert resolve_hparams("MoTE", "Some/Other-7B", mine, {}).layers == [3]


def test_name_that_could_be_several_is_none(tmp_path: Path) -> None:
    mine = own_files(tmp_path, "other-7b-base.yaml", "other-7b-chat.yaml")
    with pytest.raises(HyperParamsError, match="no hparams for MoTE"):
        resolve_hparams("MoTE", "Some/Other-7B", mine, {})


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(HyperParamsError, match="missing does not exist"):
        resolve_hparams("MoTE", "factworld", tmp_path / "missing", {})
    with pytest.raises(HyperParamsError, match="is a folder"):
        resolve_hparams("MoTE", "factworld", None, {}).from_hparams(tmp_path)


def test_rows_of_locate_are_no_hparams(tmp_path: Path) -> None:
    (tmp_path / "my-model.locate.json").write_text("{}", encoding="utf-8")
    assert model_file(tmp_path, "my-model-8b") == (None, "")
    (tmp_path / "my-model.yaml").write_text("{}", encoding="utf-8")
    assert model_file(tmp_path, "my-model")[0] == tmp_path / "my-model.yaml"


def test_a_link_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "hparams" / "my-model.yaml"
    file.parent.mkdir()
    file.write_text("alg_name: Global\n", encoding="utf-8")
    (tmp_path / "0f3a").mkdir()
    (tmp_path / "My_Model").symlink_to("0f3a", target_is_directory=True)
    for name in (tmp_path / "My_Model", f"{tmp_path / 'My_Model'}/", tmp_path / "0f3a" / ".." / "My_Model"):
        assert model_file(file.parent, str(name))[0] == file
    (tmp_path / "my-model" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "my-model")
    assert model_file(file.parent, ".")[0] == file
    assert model_file(file.parent, "deeper/..")[0] == file
