"""Folders that are no model, names that are none, and devices that are not there: errors of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer

from easyedit_moe.errors import DataError, HyperParamsError
from easyedit_moe.moe.loading import checkpoint_dtype, empty_model, load_model, load_tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny_model("qwen3_moe").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


CONFIG, WEIGHTS, TOKENIZER, INDEX = "config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json"
DEEP = "[" * 100_000
NO_MODEL: dict[str, tuple[str, Any]] = {
    "no config": (CONFIG, None), "half a config": (CONFIG, '{"a":'), "a list": (CONFIG, "[1]"),
    "a number": (CONFIG, "3"), "null": (CONFIG, "null"),
    "deep config": (CONFIG, DEEP), "UTF-16": (CONFIG, '{"a": 1}'.encode("utf-16")),
    "unknown type": (CONFIG, {"model_type": "nope"}), "type 3": (CONFIG, {"model_type": 3}),
    "a list of types": (CONFIG, {"model_type": ["qwen3_moe"]}), "size in words": (CONFIG, {"hidden_size": "big"}),
    "negative size": (CONFIG, {"hidden_size": -1}), "no heads": (CONFIG, {"num_attention_heads": 0}),
    "other size": (CONFIG, {"hidden_size": 64}), "huge": (CONFIG, {"hidden_size": 10**30}),
    "activation": (CONFIG, {"hidden_act": "nope"}), "rope": (CONFIG, {"rope_parameters": "x"}),
    "text part": (CONFIG, {"text_config": 3}), "thinker": (CONFIG, {"thinker_config": 3}),
    "quantised": (CONFIG, {"quantization_config": 3}), "more layers": (CONFIG, {"num_hidden_layers": 9}),
    "no weights": (WEIGHTS, None), "no bytes": (WEIGHTS, b""), "garbage": (WEIGHTS, b"\x10" + bytes(7) + b"x" * 99),
    "long header": (WEIGHTS, b"\xff" * 99), "cut off": (WEIGHTS, 5000), "index": (INDEX, "{}"),
    "index 3": (INDEX, '{"weight_map": 3}'),
    "index list": (INDEX, "[]"), "lost shard": (INDEX, '{"weight_map": {"a": "gone.safetensors"}}'),
    "no tokenizer": (TOKENIZER, None), "tokenizer 3": (TOKENIZER, "3"), "deep tokenizer": (TOKENIZER, DEEP),
    "kind of tokenizer": (TOKENIZER, {"model": {"type": "nope"}}), "settings 3": ("tokenizer_config.json", "3"),
    "class 3": ("tokenizer_config.json", {"tokenizer_class": 3}), "special 3": ("special_tokens_map.json", "3"),
    "generation 3": ("generation_config.json", "3"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_MODEL)
def test_a_folder_that_is_no_model_says_so(case: str, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    name, content = NO_MODEL[case]
    path = folder / name
    if name == INDEX:
        (folder / WEIGHTS).unlink()
    if content is None:
        path.unlink()
    elif isinstance(content, dict):
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **content}), encoding="utf-8")
    elif isinstance(content, int):
        path.write_bytes(path.read_bytes()[:content])
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match="model"):
        load_model(str(folder))
    for read in (empty_model, load_tokenizer, checkpoint_dtype):
        try:
            read(str(folder))
        except DataError:
            continue


@pytest.mark.parametrize("name", [3, None, b"x", ["x"], "", "a\0b", "x" * 5000, "\ud800", {}])
def test_a_model_has_a_name(name: Any) -> None:
    for read in (load_model, empty_model, load_tokenizer, checkpoint_dtype):
        with pytest.raises(DataError, match="the model must be a path"):
            read(name)


def test_a_path_is_a_name(whole: Path) -> None:
    assert load_model(whole)[0].config.model_type == "qwen3_moe"


@pytest.mark.parametrize(
    "device", ["meta", "mps", "xpu", "hpu", "xla", 99, "cuda:99", 10**30, True, None, 1.5, [0], "", "nope"]
)
def test_a_device_that_is_not_there(device: Any, whole: Path) -> None:
    with pytest.raises(HyperParamsError, match="device"):
        load_model(str(whole), device=device)
