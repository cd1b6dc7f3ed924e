"""Loading a MoE model and its tokenizer the way an edit needs them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES as CONFIGS
from transformers.utils import is_accelerate_available
from transformers.utils import logging as logging_of_transformers
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from easyedit_moe.errors import DataError, EditingError, HyperParamsError
from easyedit_moe.hparams import DTYPES
from easyedit_moe.hparams.devices import device_named
from easyedit_moe.moe.hub import Source, find_source
from easyedit_moe.progress import library_bars

logger = logging.getLogger(__name__)

_DEQUANTISE: dict[str | None, Any] = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}


@library_bars()
def load_model(
    model_name: str,
    dtype: str = "bfloat16",
    device: int | str = "cpu",
    model_parallel: bool = False,
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in evaluation mode, and its own tokenizer.

    MXFP4 checkpoints (GPT-OSS) and FP8 ones are dequantised. A multimodal checkpoint is loaded whole, and its text
    decoder is what gets edited; of an omni checkpoint, which also speaks, its thinker is loaded.

    Args:
        model_name: hub name, folder, or "factworld" for the bundled model.
        dtype: float32, bfloat16 or float16.
        device: "cpu", "cuda", "cuda:1" or a GPU's number; unused with a device map. Weights are read straight onto a
            GPU where accelerate is installed, and else by way of the CPU.
        model_parallel: the same as ``device_map="auto"``.
        device_map: accelerate's map of modules to devices, or a name that transformers knows, such as "auto".
        trust_remote_code: let the checkpoint's own code run; without it such a checkpoint is refused, and nobody asked.

    Raises:
        HyperParamsError: unknown dtype or a GPU that is not there. DataError: the checkpoint can't be found or read,
            has code of its own that is not trusted, or lacks weights.
    """
    if dtype not in DTYPES:
        raise HyperParamsError(f"dtype must be one of {', '.join(DTYPES)}; found {dtype!r}.")
    where = _device(device)
    source, options = _found(model_name, trust_remote_code)
    config = _config(model_name, source, options)
    tok = _tokenizer(model_name, source, options)
    options |= {"dtype": getattr(torch, dtype), "config": config}
    options |= _placement(where, model_parallel, device_map)
    if (dequantised := _dequantised(config)) is not None:
        logger.info("%s is %s; it is dequantised, since edits need float weights.", model_name, quant_method(config))
        options["quantization_config"] = dequantised
    model = _weights(model_name, source, _auto_class(config), options)
    if "quantization_config" in options:
        _cast_dequantised(model, getattr(torch, dtype))
    if device_map is None and not model_parallel:
        model.to(where)  # what was loaded straight onto the device stays as it is
        model.__dict__.pop("hf_device_map", None)
    return model.eval(), tok


def _placement(where: torch.device, model_parallel: bool, device_map: Any) -> dict[str, Any]:
    """What tells transformers where the weights go: a map that was asked for, or one of the device alone, so that they
    need no room on the CPU first. None of it where they stay there, or accelerate, which maps need, is not installed.
    """
    if device_map is not None or model_parallel:
        return {"device_map": device_map if device_map is not None else "auto"}
    return {"device_map": {"": where}} if where.type != "cpu" and is_accelerate_available() else {}


def load_tokenizer(model_name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A model's own tokenizer, as `load_model` gives it; no weight is read.

    Raises:
        DataError: no tokenizer by this name, or code of its own that is not trusted.
    """
    source, options = _found(model_name, trust_remote_code)
    _config(model_name, source, options)
    return _tokenizer(model_name, source, options)


def checkpoint_dtype(model_name: str, trust_remote_code: bool = False) -> str:
    """The dtype that a checkpoint's config says its float weights have, such as "bfloat16", where it says none.

    Raises:
        DataError: no config by this name, or code of its own that is not trusted.
    """
    config = _config(model_name, *_found(model_name, trust_remote_code))
    found = getattr(config, "dtype", None)
    if found is None and hasattr(config, "get_text_config"):
        found = getattr(config.get_text_config(), "dtype", None)
    name = str(found).removeprefix("torch.")
    return name if name in DTYPES else "bfloat16"


def _found(model_name: str, trust_remote_code: bool) -> tuple[Source, dict[str, Any]]:
    source = find_source(model_name)
    return source, {"trust_remote_code": trust_remote_code, "local_files_only": source.local_files_only}


def _tokenizer(model_name: str, source: Source, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer, with a token to pad with; DataError where there is none."""
    with _reading(f"The tokenizer of {model_name!r}"):
        tok: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.name, **options)
        found = tok("a", add_special_tokens=False)["input_ids"]
    # transformers makes an empty tokenizer for some models that come without one.
    if not found:
        raise DataError(f"The model {model_name!r} can't be loaded: it has no tokenizer files. Save them beside it.")
    if tok.pad_token_id is None:
        tok.pad_token = tok.eos_token
    return tok


def empty_model(model_name: str, dtype: str = "bfloat16", trust_remote_code: bool = False) -> PreTrainedModel:
    """The model on the meta device: its config is read, no weight is.

    Raises:
        DataError: no config by this name, or code of its own that is not trusted. HyperParamsError: unknown dtype.
    """
    if dtype not in DTYPES:
        raise HyperParamsError(f"dtype must be one of {', '.join(DTYPES)}; found {dtype!r}.")
    source, options = _found(model_name, trust_remote_code)
    config = _config(model_name, source, options)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # edits need float weights, so the model is loaded dequantised
    with _reading(f"The model {model_name!r}"), torch.device("meta"):
        return _auto_class(config).from_config(config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)


def _config(model_name: str, source: Source, options: Mapping[str, Any]) -> Any:
    """The config of what is loaded; DataError where it can't be read, or has code of its own that is not trusted."""
    with _reading(f"The model {model_name!r}"):
        settings, _ = PretrainedConfig.get_config_dict(source.name, local_files_only=source.local_files_only)
        if "auto_map" in settings and not options["trust_remote_code"] and settings.get("model_type") not in CONFIGS:
            raise DataError(
                f"The model {model_name!r} can't be loaded: it comes with code of its own. If you trust it, set "
                "trust_remote_code=True (in a YAML: trust_remote_code: true; of a command: --trust-remote-code)."
            )
        return _language_part(AutoConfig.from_pretrained(source.name, **options))


def _weights(model_name: str, source: Source, auto: Any, options: Mapping[str, Any]) -> Any:
    """The model with its weights; DataError where they can't be read or some are missing."""
    with _reading(f"The weights of {model_name!r}"):
        try:
            # Other formats are pickles, which may run code while they are read.
            model, report = auto.from_pretrained(source.name, output_loading_info=True, use_safetensors=True, **options)
        except OSError as error:
            raise OSError(
                f"{error} Only weights in safetensors are read; others (.bin, .pt) are pickles, which may run code. "
                "Have the model saved by save_pretrained, which writes safetensors."
            ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise DataError(
            f"The checkpoint {model_name!r} lacks {len(missing)} of the model's weights, which transformers "
            f"{transformers.__version__} would draw at random; the first is {missing[0]}. Use the version of "
            "transformers that it was saved with, or another checkpoint."
        )
    return model


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Within, a checkpoint's files are read by transformers, which raises any type of error over what is in them: each
    is a DataError, but for those of ours and for a lack of memory.
    """
    try:
        yield
    except (EditingError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind = "" if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: "
        raise DataError(f"{what} can't be loaded: {kind}{error}") from error


def empty_load(
    model: PreTrainedModel, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What transformers makes of a checkpoint with tensors of these shapes and dtypes, without reading one.

    Args:
        model: of the checkpoint's class and config, as `empty_model` makes it.
        tensors: shape and dtype of each tensor, by its name in the checkpoint.

    Returns:
        The model on the meta device, which remembers the conversions that were used, and transformers' report of keys
        that are missing, unexpected or of another shape.

    Raises:
        RuntimeError: tensors that can't be converted.
    """
    state = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in tensors.items()}
    with quiet_transformers():
        loaded: Any = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=state,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    return loaded


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers inside; as before afterwards."""
    bars, level = logging_of_transformers.is_progress_bar_enabled(), logging_of_transformers.get_verbosity()
    logging_of_transformers.disable_progress_bar()
    logging_of_transformers.set_verbosity_error()
    try:
        yield
    finally:
        logging_of_transformers.set_verbosity(level)
        if bars:
            logging_of_transformers.enable_progress_bar()


def _auto_class(config: Any) -> Any:
    """The class to load: for a multimodal checkpoint the whole model, unless it is one of the text part alone."""
    whole = config.get_text_config() is not config if hasattr(config, "get_text_config") else False
    named = getattr(config, "architectures", None) or []
    order = [AutoModelForCausalLM, AutoModelForImageTextToText]
    if whole and not any(name.endswith("ForCausalLM") for name in named):
        order.reverse()
    return next((auto for auto in order if _serves(auto, config)), AutoModelForCausalLM)


def _serves(auto: Any, config: Any) -> bool:
    return type(config) in auto._model_mapping


def _language_part(config: Any) -> Any:
    """The config of the part that understands text: of an omni model its thinker, else the whole."""
    part = getattr(config, "thinker_config", None)
    if part is None:
        return config
    if getattr(part, "dtype", None) is None:  # said once, of the whole
        part.dtype = getattr(config, "dtype", None)
    return part


def _cast_dequantised(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring bfloat16 to the dtype that was asked for, since transformers 5.5 dequantises to it whatever that is.

    What transformers keeps in float32 by itself stays so, as in a plain load.
    """
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16 != dtype:
            parameter.data = parameter.data.to(dtype)


def quant_method(config: Any) -> str | None:
    """How a checkpoint is quantised, such as "mxfp4" or "fp8"; None where it is not.

    ``config`` is its configuration, or the content of its config.json.
    """
    name = "quantization_config"
    settings = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method)).lower()


def _dequantised(config: Any) -> Any:
    """The setting with which transformers dequantises a checkpoint while loading; None where there is none."""
    method = quant_method(config)
    return _DEQUANTISE[method](dequantize=True) if method in _DEQUANTISE else None


def _device(device: int | str) -> torch.device:
    """The device that is meant, if it is there and holds tensors."""
    where = device_named(device)
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise HyperParamsError(
            f"device {device!r} is not there: this machine has {torch.cuda.device_count()} GPUs. Set device: cpu."
        )
    try:
        there = where.type != "meta" and torch.empty(0, device=where).device.type == where.type
    except Exception as error:  # each backend that is not built in has an error of its own
        raise HyperParamsError(f"device {device!r} is not there: {error}. Set device: cpu.") from error
    if not there:
        raise HyperParamsError(f"device {device!r} holds no weights. Set device: cpu.")
    return where
