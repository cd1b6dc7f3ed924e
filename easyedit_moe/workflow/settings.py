"""Which method edits, and with which hyper-parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from easyedit_moe.comparison.settings import chosen_methods, resolve_hparams
from easyedit_moe.errors import HyperParamsError
from easyedit_moe.host.baseline_hparams import BaselineHyperParams
from easyedit_moe.hparams import MoEHyperParams, read_with_defaults
from easyedit_moe.hparams.overlay import overlaid
from easyedit_moe.moe.loading import checkpoint_dtype
from easyedit_moe.storage.files import is_file, path_of
from easyedit_moe.workflow.session import Loaded, model_name

DEFAULT_METHOD = "Global"


def choose_hparams(
    method: str,
    model: str,
    hparams: str | Path | MoEHyperParams | None = None,
    overrides: Mapping[str, Any] | None = None,
    loaded: nn.Module | None = None,
) -> MoEHyperParams:
    """The hyper-parameters of one method of ours for a model; of one that no YAML is for, chosen from its config.

    The dtype is that of ``overrides``, of a file that was passed and names one, or else the checkpoint's own: a patch
    then fits the files that a server loads.

    Args:
        method: name; empty: that of the file, else Global.
        model: hub name, folder or "factworld".
        hparams: a YAML file, a folder of <METHOD>/<model>.yaml, or values; by default those that ship for the model.
        overrides: values by name, which count more; empty texts and None are left out.
        loaded: the model where it is in memory.

    Raises:
        HyperParamsError: no file for this method and model and no config to choose from, one of another method,
            EasyEdit's own method, or a value that is unknown or out of range. MethodError: an unknown method.
            DataError: no model by this name. LayoutError, DenseModelError: a model without experts to edit.
    """
    given = {name: value for name, value in (overrides or {}).items() if value is not None and value != ""}
    given["model_name"] = model
    if isinstance(hparams, MoEHyperParams):
        if method and method != hparams.alg_name:
            raise HyperParamsError(f"The hparams are of {hparams.alg_name}, not of {method}; pass one of both.")
        return type(hparams).from_dict(overlaid(hparams.to_dict(), given), "overrides")
    name = method or (chosen_methods([], hparams)[0] if _is_file(hparams) else DEFAULT_METHOD)
    said = read_with_defaults(hparams) if hparams is not None and _is_file(hparams) else {}
    if "dtype" not in given and "dtype" not in said:
        given["dtype"] = checkpoint_dtype(model, bool(given.get("trust_remote_code", said.get("trust_remote_code"))))
    found = resolve_hparams(name, model, hparams, given, loaded)
    if isinstance(found, BaselineHyperParams):
        raise HyperParamsError(
            f"{name} is EasyEdit's own method: it runs in EasyEdit and beside ours in compare, but makes no patch. Use "
            f"a method of ours, such as {_ours(name)}."
        )
    return found


def settings_for(
    model: str | Loaded, method: str, hparams: str | Path | MoEHyperParams | None, overrides: Mapping[str, Any]
) -> MoEHyperParams:
    """As `choose_hparams`; a loaded model has the name that it was loaded by, and its own dtype.

    Raises:
        HyperParamsError, MethodError, DataError: see there.
    """
    if isinstance(model, str):
        return choose_hparams(method, model, hparams, overrides)
    name = model_name(model)
    dtype = str(next(model[0].parameters()).dtype).removeprefix("torch.")
    where = name if hparams is None or not isinstance(hparams, MoEHyperParams) else hparams.model_name
    return choose_hparams(method, where, hparams, {"dtype": dtype, **overrides}, model[0])


def with_batch_size(overrides: Mapping[str, Any] | None, batch_size: int | None) -> dict[str, Any]:
    """Overrides with a batch size that was given by itself, which counts more; None says nothing of it."""
    return {**(overrides or {}), **({} if batch_size is None else {"batch_size": batch_size})}


def _ours(name: str) -> str:
    return {"FT": "MoE-FT", "FT-L": "MoE-FT-L", "LoRA": "MoE-LoRA", "ROME": "MoE-ROME", "MEMIT": "MoE-MEMIT",
            "AlphaEdit": "MoE-AlphaEdit"}.get(name, DEFAULT_METHOD)  # fmt: skip


def _is_file(path: str | Path | None) -> bool:
    return path is not None and is_file(path_of(path, "a file of hparams", HyperParamsError))
