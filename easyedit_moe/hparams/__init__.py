"""Hyper-parameters of all methods: one dataclass per family of methods, read from and written to YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from easyedit_moe.errors import HyperParamsError
from easyedit_moe.hparams import presets
from easyedit_moe.hparams.base import DTYPES, MoEHyperParams
from easyedit_moe.hparams.files import hparams_folder, read_with_defaults, read_yaml
from easyedit_moe.hparams.memoe import MEMoEHyperParams
from easyedit_moe.hparams.overlay import overlaid
from easyedit_moe.hparams.solving import GlobalHyperParams, MoEEditHyperParams, MoTEHyperParams, SolverHyperParams
from easyedit_moe.hparams.training import FTHyperParams, LoRAHyperParams, TrainingHyperParams
from easyedit_moe.hparams.unke import UnKEHyperParams

__all__ = [
    "DTYPES",
    "HYPERPARAMS",
    "FTHyperParams",
    "GlobalHyperParams",
    "LoRAHyperParams",
    "MEMoEHyperParams",
    "MoEEditHyperParams",
    "MoEHyperParams",
    "MoTEHyperParams",
    "SolverHyperParams",
    "TrainingHyperParams",
    "UnKEHyperParams",
    "hparams_folder",
    "hyperparams_class",
    "load_hyperparams",
    "read_with_defaults",
    "read_yaml",
]

HYPERPARAMS: tuple[type[MoEHyperParams], ...] = tuple(
    dict.fromkeys(presets.located(method.hparams) for method in presets.own_methods())
)
"""The classes of all methods of ours that ship."""


def hyperparams_class(alg_name: str) -> type[MoEHyperParams]:
    """The dataclass of a method of ours.

    Raises:
        MethodError: unknown method.
    """
    found: type[MoEHyperParams] = presets.located(presets.find_method(presets.canonical_name(alg_name)).hparams)
    return found


def load_hyperparams(path: str | Path, **overrides: Any) -> MoEHyperParams:
    """Read a YAML file into the class that its ``alg_name`` asks for.

    Raises:
        HyperParamsError: missing file, no or wrong ``alg_name``, unknown key, wrong type or value.
    """
    values = overlaid(read_with_defaults(path), overrides)
    if not isinstance(values.get("alg_name"), str):
        raise HyperParamsError(f"{path}: missing alg_name.")
    return hyperparams_class(values["alg_name"]).from_dict(values, str(path))
