from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from quantised import to_fp8, to_mxfp4
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer

from easyedit_moe.errors import DataError, HyperParamsError
from easyedit_moe.moe import loading
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.loading import load_model

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
