"""Which hparams a method gets for a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from easyedit_moe.editors.proposing import propose
from easyedit_moe.errors import DataError, DenseModelError, HyperParamsError
from easyedit_moe.host.baseline_hparams import BaselineHyperParams
from easyedit_moe.hparams import (
    HYPERPARAMS,
    MoEHyperParams,
    hparams_folder,
    hyperparams_class,
    load_hyperparams,
    presets,
    read_with_defaults,
)
from easyedit_moe.hparams.models import hparams_files, model_file
from easyedit_moe.storage.files import is_file, is_folder, path_of

logger = logging.getLogger(__name__)

ALL_METHODS = tuple(method.name for method in presets.own_methods())
"""Every method of ours that ships, in the order of the papers' tables."""
DEFAULT_METHODS = ("MoTE", "MoEEdit-BCD", "BCD+speedup", "Global", "Global+speedup")

_HPARAMS = "a file or folder of hparams"
_PASS_HPARAMS = "Pass --hparams with a file, or with a folder of <METHOD>/<model>.yaml."

AnyHyperParams = MoEHyperParams | BaselineHyperParams


def chosen_methods(names: Sequence[str], path: str | Path | None) -> list[str]:
    """The methods that are meant: as named, all of ours for "all"; without a name that of the file ``path``, or five.

    Raises:
        HyperParamsError, MethodError: a file that can't be read, or of no known method.
    """
    if list(names) == ["all"]:
        return list(ALL_METHODS)
    if not names and path is not None and is_file(path_of(path, _HPARAMS, HyperParamsError)):
        return [_method_of(Path(path)).name]
    return list(names) or list(DEFAULT_METHODS)


def resolve_methods(
    methods: Sequence[str],
    model_name: str,
    path: str | Path | None,
    overrides: Mapping[str, Any],
    loaded: nn.Module | None = None,
) -> list[AnyHyperParams]:
    """As `resolve_hparams`, for several methods; what is to be said of them is logged once."""
    return resolve_rows([(method, path, overrides) for method in methods], model_name, loaded)


def resolve_rows(
    rows: Sequence[tuple[str, str | Path | None, Mapping[str, Any]]], model_name: str, loaded: nn.Module | None = None
) -> list[AnyHyperParams]:
    """As `resolve_methods`, where each row has a method, a path and overrides of its own."""
    found = [_resolved(method, model_name, path, overrides, loaded) for method, path, overrides in rows]
    for line in dict.fromkeys(line for _, line in found if line):
        logger.warning(line)
    return [settings for settings, _ in found]


def resolve_hparams(
    method: str,
    model_name: str,
    path: str | Path | None,
    overrides: Mapping[str, Any],
    loaded: nn.Module | None = None,
) -> AnyHyperParams:
    """Hparams of one method: from ``path`` (a file, or a folder laid out like the shipped one), else the shipped ones.

    A model that none ship for gets what `easyedit_moe.editors.proposing.propose` chooses from its config, or from the
    model where it is ``loaded``, and a line says so. EasyEdit's own methods get its own kind of hparams. Of
    ``overrides`` count those that the method has a key for.

    Raises:
        MethodError: neither we nor EasyEdit have the method. HyperParamsError: no file for this method and model (the
            message lists what ships) and no config to choose from, a file of another method, or an override that no
            method has a key for. LayoutError, DenseModelError: the model has no experts that can be edited.
    """
    return resolve_methods([method], model_name, path, overrides, loaded)[0]


def _resolved(
    method: str, model_name: str, path: str | Path | None, overrides: Mapping[str, Any], loaded: nn.Module | None = None
) -> tuple[AnyHyperParams, str]:
    row = presets.find_method(method)
    try:
        file, line = _found_file(row.name, model_name, path)
    except HyperParamsError as refusal:
        if path is not None or row.host_name is not None:
            raise
        return _proposed(row.name, model_name, overrides, loaded, refusal)
    given = _method_of(file)
    if given.name != row.name and (given.host_name is None or given.host_name != row.host_name):
        raise HyperParamsError(
            f"{file} holds hparams of {given.name}, not of {row.name}. Pass --hparams with a folder of "
            f"<METHOD>/<model>.yaml for several methods, or ask for {given.name} alone."
        )
    if row.host_name is not None:
        return BaselineHyperParams.read(row.name, file, overrides), line
    return load_hyperparams(file, **_of_method(row.name, overrides)), line


def _proposed(
    method: str,
    model_name: str,
    overrides: Mapping[str, Any],
    loaded: nn.Module | None,
    refusal: HyperParamsError,
) -> tuple[MoEHyperParams, str]:
    """Chosen for the model, as no file is for it, which is what ``refusal`` says."""
    try:
        found = propose(model_name, method, None, bool(overrides.get("trust_remote_code")), loaded)
    except DataError as error:
        raise HyperParamsError(f"{refusal} Nor can they be chosen from its config: {error}") from error
    line = (
        f"No hparams ship for {model_name}, so they are chosen from its config; `easyedit-moe init --model {model_name}"
        "` prints them with their reasons."
    )
    return found.hparams(_of_method(method, overrides)), line


def _of_method(method: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides that the method has a key for, and those that none has, which are to be refused."""
    own, every = _keys(hyperparams_class(method)), set().union(*map(_keys, HYPERPARAMS))
    return {k: v for k, v in overrides.items() if k in own or k not in every}


def _keys(cls: type[MoEHyperParams]) -> set[str]:
    return {item.name for item in fields(cls)}


def _method_of(file: Path) -> presets.Method:
    """The method that a file's ``alg_name`` names; of EasyEdit's, the first that has it.

    Raises:
        HyperParamsError: none. MethodError: an unknown one.
    """
    name = read_with_defaults(file).get("alg_name")
    if not isinstance(name, str):
        raise HyperParamsError(f"{file}: missing alg_name.")
    hosts = [method for method in presets.host_methods() if method.host_name == name]
    return hosts[0] if hosts else presets.find_method(name)


def method_files(methods: Sequence[str], model_name: str, path: str | Path | None) -> list[Path]:
    """The files that `resolve_methods` reads; none of methods whose hparams are chosen from the model's config.

    Raises:
        MethodError: neither we nor EasyEdit have a method. HyperParamsError: ``path`` has no file for one.
    """
    found = []
    for method in methods:
        try:
            found.append(_found_file(presets.find_method(method).name, model_name, path)[0])
        except HyperParamsError:
            if path is not None:
                raise
    return found


def hparams_file(name: str, model_name: str, path: str | Path | None = None) -> Path:
    """The file of a method for a model: ``path`` itself, or in the folder ``path``, or among those that ship.

    Files have any suffix, and are named after the model, or after one that has a longer or shorter name or the same
    architecture; see `easyedit_moe.hparams.models.model_file`.

    Raises:
        HyperParamsError: no file for this method and model; the message lists what there is.
    """
    file, line = _found_file(name, model_name, path)
    if line:
        logger.warning(line)
    return file


def _found_file(name: str, model_name: str, path: str | Path | None) -> tuple[Path, str]:
    if path is not None and is_file(path_of(path, _HPARAMS, HyperParamsError)):
        return Path(path), ""
    if path is not None and not is_folder(path):
        raise HyperParamsError(f"{path} does not exist. {_PASS_HPARAMS}")
    folder = (Path(path) if path is not None else hparams_folder()) / name
    file, line = model_file(folder, model_name)
    if file is None:
        known = [p.stem for p in hparams_files(folder)]
        raise HyperParamsError(
            f"There are no hparams for {name} on {model_name!r} (no file in {folder} has its name or its "
            f"architecture). Known models: {', '.join(known) or 'none'}. {_PASS_HPARAMS}"
        )
    return file, line


def has_file(method: str, model_name: str, folder: str | Path | None = None) -> bool:
    """Whether a file is for this method and model: in a folder of <METHOD>/<model>.yaml, or among those that ship."""
    try:
        return _found_file(method, model_name, folder)[0].is_file()
    except HyperParamsError:
        return False


def loading_settings(settings: Sequence[AnyHyperParams], model_name: str) -> MoEHyperParams:
    """The hparams that say how the model is loaded: the first of ours, or, with EasyEdit's methods only, Global's.

    A dense model, which Global has none for, is loaded as the first of EasyEdit's files says, in the usual dtype.

    Raises:
        HyperParamsError: only methods of EasyEdit, and neither a file of Global for the model nor its config.
    """
    own = next((hp for hp in settings if isinstance(hp, MoEHyperParams)), None)
    if own is not None:
        return own
    try:
        found, _ = _resolved("Global", model_name, None, {"model_name": model_name})
    except DenseModelError:
        return _loading_dense(settings, model_name)
    if not isinstance(found, MoEHyperParams):
        raise HyperParamsError("Global is a method of ours.")
    return found


def _loading_dense(settings: Sequence[AnyHyperParams], model_name: str) -> MoEHyperParams:
    theirs = [hp.values for hp in settings if isinstance(hp, BaselineHyperParams)]
    told = theirs[0] if theirs else {}
    where: dict[str, Any] = {name: told[name] for name in ("device", "model_parallel") if name in told}
    return hyperparams_class("Global").from_dict(
        {"alg_name": "Global", "model_name": model_name, "layers": [0], **where}
    )
