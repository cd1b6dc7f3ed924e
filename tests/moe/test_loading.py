from __future__ import annotations

import inspect
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from own_code import module_cache
from quantised import to_fp8, to_mxfp4
from safetensors.torch import load_file, save_file
from solving_editors import hparams
from tiny import (
    TEXTS,
    assert_same_state,
    requests,
    state_of,
    tiny_model,
    tiny_multimodal,
    tiny_omni,
    tiny_tokenizer,
)
from torch import nn

from easyedit_moe import editor
from easyedit_moe.checkpoints.saving import save_edited
from easyedit_moe.editors import make_editor
from easyedit_moe.errors import DataError, HyperParamsError
from easyedit_moe.hparams import load_hyperparams
from easyedit_moe.moe import hub, loading
from easyedit_moe.moe.embeddings import output_embeddings
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.loading import empty_model, load_model
from easyedit_moe.patches.files import load_patch

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def saved(folder: Path, family: str = "qwen3_moe", pad: bool = True) -> Path:
    tiny_model(family).save_pretrained(folder)
    tiny_tokenizer(pad=pad).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: saved(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models_load(family: str, dtype: str, folders: dict[str, Path]) -> None:
    model, tok = load_model(str(folders[family]), dtype)
    original = tiny_model(family, dtype=DTYPES[dtype])
    assert type(model) is type(original)
    assert not any(module.training for module in model.modules())
    loaded = dict(model.named_parameters())
    for name, parameter in original.named_parameters():
        if "norm" not in name:  # transformers keeps GPT-OSS's norms in float32 where the rest is float16
            assert loaded[name].dtype == DTYPES[dtype], name
        assert torch.equal(loaded[name].to(DTYPES[dtype]), parameter), name
    assert MoELayerView(model).layers
    text = "Zoë lives in Rome."
    assert tok(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]


def test_default_dtype_and_device(folders: dict[str, Path]) -> None:
    model, _ = load_model(str(folders["qwen3_moe"]))
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "cpu")}


def test_tokenizer_without_a_pad_token(tmp_path: Path, folders: dict[str, Path]) -> None:
    assert tiny_tokenizer(pad=False).pad_token_id is None
    _, tok = load_model(str(saved(tmp_path, pad=False)))
    assert tok.pad_token_id == tok.eos_token_id == 0
    _, tok = load_model(str(folders["qwen3_moe"]))
    assert tok.pad_token_id == 0


def test_device_map(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    model, _ = load_model(str(folders["mixtral"]), "float32", device_map={"": "cpu"})
    assert torch.equal(model.lm_head.weight, tiny_model("mixtral").lm_head.weight)
    asked = {}

    def record(name: str, **options: object) -> None:
        asked.update(options)
        raise OSError("enough")

    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", record)
    for parallel, device_map, expected in ((True, None, "auto"), (False, "auto", "auto"), (True, {"": 0}, {"": 0})):
        with pytest.raises(DataError, match="enough"):
            load_model(str(folders["mixtral"]), model_parallel=parallel, device_map=device_map)
        assert asked.pop("device_map") == expected
    with pytest.raises(DataError):
        load_model(str(folders["mixtral"]))
    assert "device_map" not in asked


# ---------------------------------------------------------------- straight onto a device


@pytest.mark.parametrize("where", ["cpu", "cuda", "cuda:1"])
@pytest.mark.parametrize("accelerate", [True, False])
def test_weights_go_straight_onto_a_gpu_where_accelerate_is_there(
    where: str, accelerate: bool, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def record(name: str, **options: object) -> None:
        asked.update(options)
        raise OSError("enough")

    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", record)
    monkeypatch.setattr(loading, "_device", torch.device)
    monkeypatch.setattr(loading, "is_accelerate_available", lambda: accelerate)
    with pytest.raises(DataError, match="enough"):
        load_model(str(folders["mixtral"]), device=where)
    straight = accelerate and where != "cpu"
    assert asked.get("device_map") == ({"": torch.device(where)} if straight else None)
    assert ("device_map" in asked) == straight


@pytest.fixture
def straight(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Models are loaded onto the CPU by a device map, as they are onto a GPU; what transformers made of them."""
    pytest.importorskip("accelerate")
    found: list[Any] = []
    weights = loading._weights

    def mapped(name: str, source: Any, auto: Any, options: Any) -> Any:
        assert options["device_map"] == {"": torch.device("cpu")}
        model = weights(name, source, auto, options)
        model.hf_device_map = {"": torch.device("cpu")}  # as earlier versions of transformers leave it
        found.append(model)
        return model

    monkeypatch.setattr(loading, "_placement", lambda where, *_: {"device_map": {"": where}})
    monkeypatch.setattr(loading, "_weights", mapped)
    return found


def assert_as_moved(model: nn.Module, moved: nn.Module) -> None:
    """The same bits, and no trace of a map: hooks and attributes are those of a model that was moved."""
    assert model.device == moved.device
    ours, theirs = dict(model.named_modules()), dict(moved.named_modules())
    assert ours.keys() == theirs.keys()
    for name, module in ours.items():
        assert set(vars(module)) == set(vars(theirs[name])), name
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        assert "forward" not in vars(module), name
    assert_same_state(state_of(model), state_of(moved))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_was_loaded_straight_is_as_one_that_was_moved(
    family: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, straight: list[Any]
) -> None:
    model, _ = load_model(str(folders[family]), "float32")
    assert straight == [model]
    monkeypatch.undo()
    moved, _ = load_model(str(folders[family]), "float32")
    assert_as_moved(model, moved)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["mxfp4", "fp8"])
def test_dequantisation_is_the_same_straight_onto_the_device(
    form: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: list[Any]
) -> None:
    if form == "mxfp4":
        to_mxfp4(saved(tmp_path, "gpt_oss"))
    else:
        to_fp8(saved(tmp_path))
    model, _ = load_model(str(tmp_path), dtype)
    assert straight == [model]
    monkeypatch.undo()
    moved, _ = load_model(str(tmp_path), dtype)
    assert_as_moved(model, moved)


@pytest.mark.usefixtures("no_editing_warnings")
def test_edits_patches_and_checkpoints_are_the_same_straight_onto_the_device(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: list[Any]
) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    source = str(folders["qwen3_moe"])

    def edited(name: str) -> dict[str, object]:
        hp = hparams(tmp_path, model_name=source, device="cpu")
        ours = editor.MoEEditor.from_hparams(hp)
        before, plan = state_of(ours.model), make_editor(hp).plan(ours.model, 3)
        ours.edit_requests(requests(), sequential_edit=True, verbose=False)
        after = state_of(ours.model)
        for number, patch in enumerate(ours.patches):
            patch.save(tmp_path / name / f"{number}.safetensors")
        save_edited(ours.model, ours.tok, tmp_path / name / "checkpoint", source)
        ours.undo(3)
        assert_same_state(state_of(ours.model), before)
        return after | {"plan": repr(plan)}

    after = edited("straight")
    assert len(straight) == 1
    monkeypatch.undo()
    wanted = edited("moved")
    assert_same_state(after, wanted)
    assert after["plan"] == wanted["plan"]
    weights = [load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("straight", "moved")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    model, _ = load_model(source, "float32")
    for number in range(3):
        load_patch(tmp_path / "straight" / f"{number}.safetensors").apply(model)
    assert_same_state(state_of(model), wanted)


# ---------------------------------------------------------------- what can't be loaded


def test_missing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (str(tmp_path / "nowhere"), str(tmp_path), "./nowhere"):
        with pytest.raises(DataError, match="can't be loaded"):
            load_model(name)


def test_folder_without_a_part(tmp_path: Path) -> None:
    saved(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    with pytest.raises(DataError, match=r"weights of .* can't be loaded"):
        load_model(str(tmp_path))
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"weights of .* can't be loaded"):
        load_model(str(tmp_path))
    weights.write_bytes(whole)
    load_model(str(tmp_path))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match="can't be loaded"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("content", ["{", '{"model_type": "no_such_model"}', "{}", "[]"])
def test_unusable_config(content: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(DataError, match="can't be loaded"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("lost", ["experts", "self_attn.q_proj"])
def test_weights_that_a_checkpoint_lacks_are_not_made_up(lost: str, tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if f"layers.2.{lost}" not in name.replace("mlp.", "")}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=rf"lacks \d+ .*weights.*layers\.2\..*{lost}"):
        load_model(str(tmp_path))


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    model = tiny_model()
    config = model.config
    config.tie_word_embeddings = True
    tied = hf.AutoModelForCausalLM.from_config(config)
    tied.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, _ = load_model(str(tmp_path), "float32")
    assert torch.equal(loaded.lm_head.weight, tied.lm_head.weight)


@pytest.mark.parametrize("dtype", ["float64", "int8", "auto", "torch.float32"])
def test_unknown_dtype(dtype: str, folders: dict[str, Path]) -> None:
    with pytest.raises(HyperParamsError, match="dtype must be one of float32, bfloat16, float16"):
        load_model(str(folders["qwen3_moe"]), dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "nonsense:0", -1, ""])
def test_bad_device(device: int | str, folders: dict[str, Path]) -> None:
    with pytest.raises(HyperParamsError, match="device must be 'cpu', 'cuda', 'cuda:N' or a number"):
        load_model(str(folders["qwen3_moe"]), device=device)


@pytest.mark.parametrize("device", ["cuda:99", 99])
def test_a_gpu_that_is_not_there(device: int | str) -> None:
    with pytest.raises(HyperParamsError, match=r"is not there: this machine has .* GPUs"):
        load_model("the device is checked before anything is read", device=device)


# ---------------------------------------------------------------- MXFP4


def test_quantised_formats_are_recognised() -> None:
    raw = hf.GptOssConfig(quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    assert loading.quant_method(raw) == "mxfp4"
    assert loading.quant_method(SimpleNamespace(quantization_config=hf.Mxfp4Config())) == "mxfp4"
    assert loading.quant_method(hf.GptOssConfig()) is None
    assert loading.quant_method(SimpleNamespace(quantization_config=None)) is None
    assert loading.quant_method(SimpleNamespace(quantization_config={"quant_method": "fp8"})) == "fp8"
    bits = SimpleNamespace(quantization_config=hf.BitsAndBytesConfig(load_in_8bit=True))
    assert loading._dequantised(bits) is None
    assert loading.quant_method(bits) == "bitsandbytes"


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_checkpoints_are_dequantised(dtype: str, tmp_path: Path) -> None:
    meaning = to_mxfp4(saved(tmp_path, "gpt_oss"))
    assert len(meaning) == 8
    model, tok = load_model(str(tmp_path), dtype)
    view = MoELayerView(model)
    assert {moe.experts.layout.dtype for moe in view.layers.values()} == {DTYPES[dtype]}
    parameters = dict(model.named_parameters())
    for name, value in meaning.items():
        assert torch.equal(parameters[name].float(), value), name
    with torch.no_grad():
        assert torch.isfinite(model(**tok("Zoë lives in", return_tensors="pt")).logits).all()


def test_fp8_checkpoints_are_dequantised(tmp_path: Path) -> None:
    meaning = to_fp8(saved(tmp_path))
    model, _ = load_model(str(tmp_path))
    view = MoELayerView(model)
    for j in range(8):
        name = f"model.layers.2.mlp.experts.{j}.down_proj.weight"
        assert torch.equal(view.layers[2].experts.read(j), meaning[name].bfloat16())


# ---------------------------------------------------------------- classes and names


def test_multimodal_configs_take_the_multimodal_class() -> None:
    assert loading._auto_class(hf.Qwen3MoeConfig()) is hf.AutoModelForCausalLM
    assert loading._auto_class(hf.GptOssConfig()) is hf.AutoModelForCausalLM
    assert loading._auto_class(hf.Qwen3VLMoeConfig()) is hf.AutoModelForImageTextToText


def test_omni_models_are_loaded_by_their_thinker() -> None:
    assert loading._language_part(hf.Qwen3OmniMoeConfig()).model_type == "qwen3_omni_moe_thinker"
    assert loading._language_part(plain := hf.Qwen3MoeConfig()) is plain


@pytest.mark.parametrize("name", ["qwen3_5_moe", "qwen3_vl_moe"])
def test_multimodal_checkpoints_are_loaded_whole(name: str, tmp_path: Path) -> None:
    whole = tiny_multimodal(name)
    whole.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), "float32")
    assert type(model) is type(whole)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in whole.named_parameters()}
    assert sorted(MoELayerView(model).layers) == [0, 1, 2, 3]
    assert output_embeddings(model) is model.lm_head


def test_omni_checkpoints_are_loaded_with_their_head(tmp_path: Path) -> None:
    whole = tiny_omni()
    whole.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), "float32")
    view = MoELayerView(model)
    assert view.stack_name == "model.language_model.layers"
    assert sorted(view.layers) == [0, 1, 2, 3]
    assert torch.equal(output_embeddings(model).weight, whole.thinker.lm_head.weight)


def test_a_text_part_saved_alone_stays_a_text_model() -> None:
    config = hf.Qwen3_5MoeConfig(architectures=["Qwen3_5MoeForCausalLM"])
    assert loading._auto_class(config) is hf.AutoModelForCausalLM


# ---------------------------------------------------------------- code that comes with a checkpoint


def with_own_code(folder: Path) -> Path:
    """A checkpoint of a model type that transformers lacks, whose code leaves a mark when it runs."""
    saved(folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own_moe", "auto_map": names}))
    (folder / "own.py").write_text(
        "from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM\n\n\n"
        "class OwnConfig(Qwen3MoeConfig):\n    model_type = 'own_moe'\n\n\n"
        "class OwnModel(Qwen3MoeForCausalLM):\n    config_class = OwnConfig\n"
    )
    return folder


def test_own_code_is_refused_without_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("a question on standard input")

    monkeypatch.setattr("builtins.input", asked)
    folder = with_own_code(tmp_path)
    for load in (load_model, empty_model):
        with pytest.raises(DataError, match=r"code of its own.*trust_remote_code=True"):
            load(str(folder))


def test_trusted_code_runs(tmp_path: Path) -> None:
    folder = with_own_code(tmp_path / "model")
    with module_cache(tmp_path / "modules"):
        assert type(empty_model(str(folder), trust_remote_code=True)).__name__ == "OwnModel"


@pytest.mark.parametrize("trusted", [False, True])
def test_hparams_say_whether_code_is_trusted(trusted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def load(*arguments: Any, **options: Any) -> None:
        seen.update(inspect.signature(load_model).bind(*arguments, **options).arguments)
        raise DataError("seen")

    chosen = load_hyperparams("Global/factworld", trust_remote_code=trusted)
    monkeypatch.setattr(editor, "load_model", load)
    with pytest.raises(DataError, match="seen"):
        editor.MoEEditor.from_hparams(chosen)
    assert seen["trust_remote_code"] is trusted


# ---------------------------------------------------------------- without a network


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tries to reach a network, each of which hangs for a while and fails; the hub is not known to be offline."""
    found: list[str] = []

    def fail(host: str, *_: object, **__: object) -> None:
        found.append(host)
        time.sleep(0.2)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return found


@pytest.mark.parametrize("load", [load_model, empty_model])
def test_a_hub_that_is_away_is_asked_once(load: Callable[[str], object], attempts: list[str]) -> None:
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"'some/model' can't be loaded.*not in the hub's cache.*does not answer"):
        load("some/model")
    assert len(attempts) == 1
    assert time.perf_counter() - start < 3


def test_a_hub_that_hangs_is_given_up(attempts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(5))
    start = time.perf_counter()
    assert not hub.hub_answers(0.2)
    assert time.perf_counter() - start < 2


def test_folders_and_names_that_are_none_need_no_network(
    attempts: list[str], folders: dict[str, Path], tmp_path: Path
) -> None:
    load_model(str(folders["qwen3_moe"]))
    load_model("factworld")
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c", "not a name", "~/model"):
        with pytest.raises(DataError, match="can't be loaded"):
            load_model(name)
    assert not attempts


def test_what_is_in_the_cache_is_read_from_it(
    attempts: list[str], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = folders["qwen3_moe"] / "config.json"
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: str(config))
    assert hub.find_source("some/model") == hub.Source("some/model", True)
    assert len(attempts) == 1
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.find_source("some/model") == hub.Source("some/model", True)
    assert len(attempts) == 1


def test_a_hub_that_answers_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    server = HTTPServer(("127.0.0.1", 0), type("Refusing", (BaseHTTPRequestHandler,), {"log_message": lambda *_: None}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert hub.find_source("some/model") == hub.Source("some/model", False)  # an error is an answer
    finally:
        server.shutdown()
        server.server_close()
