"""Saving an edited model so that any loader reads it as it is in memory, and checking that one will.

transformers' ``save_pretrained`` writes a dequantised model under the quantised names, which a reload then fills with
random numbers, and drops what the class in memory does not hold (a vision tower beside a text model, extra heads). So
an edited model is saved onto the checkpoint it came from: files are copied, and only tensors that differ are written.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, cached_file

from easyedit_moe.checkpoints.history import Edit, read_history, write_history
from easyedit_moe.checkpoints.naming import CheckpointNames, Row
from easyedit_moe.checkpoints.parameters import StoredParameters
from easyedit_moe.checkpoints.rewriting import Rewriting
from easyedit_moe.checkpoints.shards import INDEX, Checkpoint
from easyedit_moe.checkpoints.staging import copy_files, new_folder
from easyedit_moe.errors import CheckpointError, DataError
from easyedit_moe.moe.hub import find_source
from easyedit_moe.moe.loading import empty_load, empty_model, quant_method, quiet_transformers
from easyedit_moe.storage.tensors import system_errors

logger = logging.getLogger(__name__)

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


def save_edited(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    folder: str | Path,
    source: str | Path,
    edits: Sequence[Edit] = (),
) -> Path:
    """Save an edited model with everything that came with it; a plain reload computes the same bits.

    Where the source is unquantised or MXFP4 and in the model's dtype, all its files are copied and only tensors that
    differ are written, edited MXFP4 layers in bfloat16; all other tensors and files are byte-equal. Otherwise (another
    dtype, or FP8 that was dequantised on loading) the whole model is written dense, without a quantisation config, and
    the source's other files are copied beside it.

    Code that came with the source runs again only where the model's own class is of it, so was trusted when it loaded.

    Args:
        model: as `load_model` gave it, edited, with no adapter attached.
        tok: its tokenizer, saved where the source has none.
        folder: where to save; absent or empty.
        source: what the model was loaded from: folder, hub name in the cache, or "factworld".
        edits: what lies on the model and not on the source, for the folder's history (see `edit_of`).

    Raises:
        CheckpointError: the model can't be saved so that it is right (still quantised, offloaded, holding parameters
            that the source lacks), or ``folder`` is not free. Nothing is then left in ``folder``.
    """
    folder, origin = Path(folder), source_folder(str(source))
    _check_savable(model)
    with new_folder(folder) as partial:
        changes = _changes(model, origin)
        if changes is None:
            _save_dense(model, tok, partial, origin)
        else:
            _save_onto(model, tok, partial, origin, *changes)
        if edits:
            write_history(partial, [*read_history(origin), *edits])
        check_saved(partial, is_remote(model))
    return folder


def is_remote(model: nn.Module) -> bool:
    """Whether a model's class is code that came with its checkpoint, which is running already."""
    return type(model).__module__.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME


def check_saved(folder: str | Path, trust_remote_code: bool = False) -> None:
    """Check that a plain reload finds every weight it asks for, under its name and in its shape.

    transformers' own loading code is run on the names and shapes in the files' headers; no weight is read.

    Raises:
        CheckpointError: weights are missing (they would be drawn at random) or of another shape.
    """
    folder = Path(folder)
    checkpoint = Checkpoint.of_folder(folder)
    shapes = {name: (entry.shape, entry.dtype) for name, entry in checkpoint.tensors.items()}
    try:
        model = empty_model(str(folder), trust_remote_code=trust_remote_code)
        settings = getattr(_config(folder, trust_remote_code), _QUANTIZED, None)
        if settings is not None:
            setattr(model.config, _QUANTIZED, settings)
        _, report = empty_load(model, shapes)
    except (DataError, RuntimeError, ValueError, ImportError) as error:
        raise CheckpointError(f"{folder} can't be loaded by transformers: {error}") from error
    found = [f"{len(report[kind])} {word}" for kind, word in _FAULTS.items() if report[kind]]
    if found:
        first = next(iter(sorted(map(str, report["missing_keys"] or report["mismatched_keys"]))))
        raise CheckpointError(
            f"A reload of {folder} would draw weights at random: {' and '.join(found)}; the first is {first}."
        )


_QUANTIZED = "quantization_config"
_FAULTS = {"missing_keys": "are missing", "mismatched_keys": "are of another shape"}


def source_folder(source: str) -> Path:
    """The folder of a checkpoint: itself, the bundled model's, or that of the hub's cache.

    Raises:
        DataError: there is no such folder, and it is not in the cache.
    """
    found = find_source(source)
    if os.path.isdir(found.name):
        return Path(found.name)
    try:
        return Path(str(cached_file(found.name, "config.json", local_files_only=True))).parent
    except OSError as error:
        raise DataError(f"{source!r} is no folder and not in the hub's cache: {error}") from error


def _config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The config in a folder; CheckpointError where it can't be read, or has code of its own that is not trusted."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"The config in {folder} can't be read: {error}") from error


def _check_savable(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise CheckpointError(f"{name} is offloaded, so the model can't be saved. Load it without a device map.")
        if parameter.dtype not in _FLOATS or hasattr(parameter, "quant_state"):
            raise CheckpointError(
                f"{name} is quantised in memory ({parameter.dtype}), so the edited model can't be saved. Save the "
                "patch and apply it to the checkpoint, or load the model dequantised."
            )


def _changes(model: PreTrainedModel, origin: Path) -> tuple[StoredParameters, list[tuple[str, Row]]] | None:
    """What of a model differs from the checkpoint it came from; None where that can't hold it bit by bit."""
    if quant_method(_config(origin, is_remote(model))) not in (None, "mxfp4"):
        return None
    checkpoint = Checkpoint.of_folder(origin)
    stored = StoredParameters(CheckpointNames(origin, checkpoint, is_remote(model)))
    if type(stored.names.model) is not type(model):
        return None
    unknown = [name for name, _ in model.named_parameters() if name not in stored.names.parameters]
    if unknown:
        raise CheckpointError(
            f"The model holds {len(unknown)} parameters that {origin} lacks; the first is {unknown[0]}. Detach "
            "adapters and save them beside the checkpoint."
        )
    changed: list[tuple[str, Row]] = []
    for name, parameter in model.named_parameters():
        rows = range(len(parameter)) if parameter.dim() == 3 and parameter.shape[1] > 1 else [None]
        for row in rows:
            value = parameter.detach() if row is None else parameter.detach()[row]
            before = stored.read(name, row)
            if _same(before, value.cpu()):
                continue
            if not _fits(value, before.dtype):
                return None
            changed.append((name, row))
    return stored, changed


def _same(stored: Tensor, value: Tensor) -> bool:
    """Whether a stored tensor, loaded in the dtype of ``value``, is ``value``, bit by bit."""
    loaded = stored.to(value.dtype).contiguous()
    return torch.equal(loaded.view(torch.uint8), value.contiguous().view(torch.uint8))


def _fits(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype holds these values exactly."""
    return torch.equal(value.to(dtype).to(value.dtype), value)


def _save_onto(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    partial: Path,
    origin: Path,
    stored: StoredParameters,
    changed: list[tuple[str, Row]],
) -> None:
    """Copy the source, and write the parameters that differ."""
    rewriting = Rewriting(stored, sorted(set(changed), key=str))
    copy_files(origin, partial, set(rewriting.files))
    parameters = rewriting.start(origin, partial)
    for name, row in changed:
        value = model.get_parameter(name).detach()
        value = value if row is None else value[row]
        parameters.write(name, value.to("cpu", parameters.dtype(name)), row)
    if not any(os.path.exists(origin / file) for file in ("tokenizer.json", "tokenizer_config.json")):
        tok.save_pretrained(partial)


def _save_dense(model: PreTrainedModel, tok: PreTrainedTokenizerBase, partial: Path, origin: Path) -> None:
    """Write all parameters, in the dtype they have in memory, and what else came with the source."""
    config = _config(origin, is_remote(model))
    whole = type(config)
    if whole is not type(model.config):
        raise CheckpointError(
            f"{origin} holds more than the {type(model).__name__} in memory, and not in its dtype, so the whole can't "
            "be saved. Load the model in the checkpoint's dtype."
        )
    with (
        _as_float(model, quant_method(config) is not None),
        quiet_transformers(),
        system_errors(),
    ):
        model.save_pretrained(partial)
    tok.save_pretrained(partial)
    written = {path.name for path in partial.iterdir()}
    copy_files(origin, partial, {p.name for p in origin.iterdir() if p.suffix in _WEIGHTS} | {INDEX} | written)


@contextmanager
def _as_float(model: PreTrainedModel, quantised: bool) -> Iterator[None]:
    """Inside, a model that was dequantised on loading is saved as the float model that it is."""
    kept: dict[str, Any] = {}
    for name in ("hf_quantizer", "_weight_conversions") if quantised else ():
        if name in model.__dict__:
            kept[name] = model.__dict__.pop(name)
    settings = model.config.__dict__.pop(_QUANTIZED, None)
    state = {name: getattr(model.config, name, None) for name in ("dtype", "architectures")}
    try:
        yield
    finally:
        model.__dict__.update(kept)
        if settings is not None:
            setattr(model.config, _QUANTIZED, settings)
        for name, value in state.items():
            setattr(model.config, name, value)
