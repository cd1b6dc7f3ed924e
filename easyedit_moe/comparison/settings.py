"""Which hparams a method gets for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from easyedit_moe.errors import HyperParamsError
from easyedit_moe.host.baseline_hparams import BaselineHyperParams
from easyedit_moe.hparams import MoEHyperParams, hparams_folder, load_hyperparams, presets

ALL_METHODS = tuple(method.name for method in presets.own_methods())
"""Every method of ours that ships, in the order of the papers' tables."""
DEFAULT_METHODS = ("MoTE", "MoEEdit-BCD", "BCD+speedup", "Global", "Global+speedup")


def resolve_hparams(
    method: str, model_name: str, path: str | Path | None, overrides: Mapping[str, Any]
) -> MoEHyperParams | BaselineHyperParams:
    """Hparams of one method: from ``path`` (a file, or a folder laid out like the shipped one), else the shipped ones.

    EasyEdit's own methods get its own kind of hparams.

    Raises:
        MethodError: neither we nor EasyEdit have the method. HyperParamsError: no file for this method and model; the
            message lists what ships.
    """
    row = presets.find_method(method)
    name, theirs = row.name, row.host_name is not None

    def read(file: Path) -> MoEHyperParams | BaselineHyperParams:
        return BaselineHyperParams.read(name, file, overrides) if theirs else load_hyperparams(file, **overrides)

    return read(hparams_file(name, model_name, path))


def hparams_file(name: str, model_name: str, path: str | Path | None = None) -> Path:
    """The YAML file of a method for a model: ``path`` itself, or in the folder ``path``, or among those that ship.

    Raises:
        HyperParamsError: no file for this method and model; the message lists what there is.
    """
    if path is not None and Path(path).is_file():
        return Path(path)
    folder = Path(path) if path is not None else hparams_folder()
    file = folder / name / f"{Path(model_name).name.lower()}.yaml"
    if not file.is_file():
        known = sorted(p.stem for p in (folder / name).glob("*.yaml"))
        raise HyperParamsError(
            f"There are no hparams for {name} on {model_name!r} ({file} does not exist). Known models: "
            f"{', '.join(known) or 'none'}. Pass --hparams with a file, or with a folder of <METHOD>/<model>.yaml."
        )
    return file


def loading_settings(settings: Sequence[MoEHyperParams | BaselineHyperParams], model_name: str) -> MoEHyperParams:
    """The hparams that say how the model is loaded: the first of ours, or, with EasyEdit's methods only, Global's.

    Raises:
        HyperParamsError: only methods of EasyEdit, and no file of Global for the model.
    """
    own = next((hp for hp in settings if isinstance(hp, MoEHyperParams)), None)
    return own or load_hyperparams(hparams_file("Global", model_name), model_name=model_name)
