"""Loading a MoE model and its tokenizer the way an edit needs them."""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.quantization_config import Mxfp4Config

from easyedit_moe import factworld
from easyedit_moe.errors import DataError, HyperParamsError
from easyedit_moe.hparams import DTYPES
from easyedit_moe.progress import library_bars

logger = logging.getLogger(__name__)


@library_bars()
def load_model(
    model_name: str,
    dtype: str = "bfloat16",
    device: int | str = "cpu",
    model_parallel: bool = False,
    device_map: Any = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in evaluation mode, and its own tokenizer.

    MXFP4 checkpoints (GPT-OSS) are dequantised. A multimodal checkpoint without a text-only class is loaded whole; its
    text decoder is what gets edited.

    Args:
        model_name: hub name, folder, or "factworld" for the bundled model.
        dtype: float32, bfloat16 or float16.
        device: "cpu", "cuda", "cuda:1" or a GPU's number; unused with a device map.
        model_parallel: the same as ``device_map="auto"``.
        device_map: accelerate's map of modules to devices, or a name that transformers knows, such as "auto".

    Raises:
        HyperParamsError: unknown dtype or a GPU that is not there. DataError: the checkpoint can't be found or read, or
            lacks weights.
    """
    if dtype not in DTYPES:
        raise HyperParamsError(f"dtype must be one of {', '.join(DTYPES)}; found {dtype!r}.")
    name = str(factworld.model_path()) if model_name == factworld.MODEL_NAME else model_name
    where = _device(device)
    try:
        config = AutoConfig.from_pretrained(name)
        tok = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"The model {model_name!r} can't be loaded: {error}") from error
    # transformers makes an empty tokenizer for some models that come without one.
    if not tok("a", add_special_tokens=False)["input_ids"]:
        raise DataError(f"The model {model_name!r} can't be loaded: it has no tokenizer files. Save them beside it.")
    if tok.pad_token_id is None:
        tok.pad_token = tok.eos_token
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "config": config}
    if device_map is not None or model_parallel:
        options["device_map"] = device_map if device_map is not None else "auto"
    if _is_mxfp4(config):
        logger.info("%s is MXFP4; it is dequantised, since edits need float weights.", model_name)
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    try:
        model, report = _auto_class(config).from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"The weights of {model_name!r} can't be loaded: {error}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise DataError(
            f"The checkpoint {model_name!r} lacks {len(missing)} of the model's weights, which transformers "
            f"{transformers.__version__} would draw at random; the first is {missing[0]}. Use the version of "
            "transformers that it was saved with, or another checkpoint."
        )
    if "quantization_config" in options:
        model.to(getattr(torch, dtype))  # transformers 5.5 dequantises to bfloat16 whatever was asked for
    if "device_map" not in options:
        model.to(where)
    return model.eval(), tok


def empty_model(model_name: str, dtype: str = "bfloat16") -> PreTrainedModel:
    """The model on the meta device: its config is read, no weight is.

    Raises:
        DataError: no config by this name. HyperParamsError: unknown dtype.
    """
    if dtype not in DTYPES:
        raise HyperParamsError(f"dtype must be one of {', '.join(DTYPES)}; found {dtype!r}.")
    name = str(factworld.model_path()) if model_name == factworld.MODEL_NAME else model_name
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"The config of {model_name!r} can't be loaded: {error}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # edits need float weights, so the model is loaded dequantised
    with torch.device("meta"):
        return _auto_class(config).from_config(config, dtype=getattr(torch, dtype))


def _auto_class(config: Any) -> Any:
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _is_mxfp4(config: Any) -> bool:
    settings = getattr(config, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method)).lower() == "mxfp4"


def _device(device: int | str) -> torch.device:
    try:
        where = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError as error:
        raise HyperParamsError(f"device must be 'cpu', 'cuda', 'cuda:N' or a number; found {device!r}.") from error
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise HyperParamsError(
            f"device {device!r} is not there: this machine has {torch.cuda.device_count()} GPUs. Set device: cpu."
        )
    return where
