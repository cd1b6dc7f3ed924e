"""Hyper-parameters of all methods: one dataclass per family of methods, read from and written to YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from easyedit_moe.errors import HyperParamsError
from easyedit_moe.hparams import presets
from easyedit_moe.hparams.base import DTYPES, MoEHyperParams
from easyedit_moe.hparams.files import hparams_folder, read_yaml
from easyedit_moe.hparams.memoe import MEMoEHyperParams
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
    "read_yaml",
]

HYPERPARAMS: tuple[type[MoEHyperParams], ...] = (
    MoTEHyperParams,
    MoEEditHyperParams,
    GlobalHyperParams,
    FTHyperParams,
    LoRAHyperParams,
    UnKEHyperParams,
    MEMoEHyperParams,
)


def hyperparams_class(alg_name: str) -> type[MoEHyperParams]:
    """The dataclass of a method.

    Raises:
        MethodError: unknown method.
    """
    name = presets.canonical_name(alg_name)
    return next(cls for cls in HYPERPARAMS if name in cls.methods)


def load_hyperparams(path: str | Path, **overrides: Any) -> MoEHyperParams:
    """Read a YAML file into the class that its ``alg_name`` asks for."""
    values = {**read_yaml(path), **overrides}
    if not isinstance(values.get("alg_name"), str):
        raise HyperParamsError(f"{path}: missing alg_name.")
    return hyperparams_class(values["alg_name"]).from_dict(values, str(path))
