"""Where YAML files of hyper-parameters are found, and how they are read."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from easyedit_moe.errors import HyperParamsError, did_you_mean, shown
from easyedit_moe.hparams import presets
from easyedit_moe.hparams.overlay import overlaid
from easyedit_moe.storage.files import is_file, is_folder, path_of
from easyedit_moe.storage.strict_yaml import parse_yaml

DEFAULTS = "defaults"
"""Key of an hparams file that names the file of what all methods share of its model."""


def hparams_folder() -> Path:
    """Folder of the YAML files that ship with the package: ``<METHOD>/<model>.yaml``."""
    package = Path(__file__).parent.parent
    installed = package / "hparams_yaml"
    return installed if installed.is_dir() else package.parent / "hparams"


def find_yaml(path: str | Path) -> Path:
    """The file that a path means: itself, or a name without folder, like ``MoTE/factworld``, of those that ship.

    Raises:
        HyperParamsError: there is none, or it is no path.
    """
    path = path_of(path, "the hparams file", HyperParamsError)
    ends = ("", ".yaml", ".yml")
    candidates = [Path(f"{folder}{path}{end}") for folder in ("", f"{hparams_folder()}/") for end in ends]
    if path.parts[:1] == ("hparams",):
        candidates.append(hparams_folder() / Path(*path.parts[1:]))
    found = next((c for c in candidates if is_file(c)), None)
    if found is None and is_folder(path):
        raise HyperParamsError(f"{path} is a folder; name one hparams file in it.")
    if found is None:
        shipped = sorted(str(p.relative_to(hparams_folder())) for p in hparams_folder().glob("*/*.yaml"))
        raise HyperParamsError(f"The hparams file {path} does not exist.{did_you_mean(str(path), shipped)}")
    return found


def is_yaml(path: str | Path) -> bool:
    """Whether `find_yaml` finds a file by this name."""
    try:
        find_yaml(path)
    except HyperParamsError:
        return False
    return True


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in one YAML file, found by `find_yaml`.

    Raises:
        HyperParamsError: no such file, or one that holds no mapping.
    """
    found = find_yaml(path)
    try:
        values = parse_yaml(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HyperParamsError(f"{found} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise HyperParamsError(f"{found} must hold a mapping of names to values.")
    return values


def read_with_defaults(path: str | Path) -> dict[str, Any]:
    """The values of an hparams file of ours, over those of the file that its key ``defaults`` names.

    That file holds what all methods share of a model; of it count the keys that the method has.

    Raises:
        HyperParamsError: a missing file, one that holds no mapping, or shared keys that no method has.
    """
    own, shared, _ = read_layers(path)
    return overlaid(shared, own)


def read_layers(path: str | Path) -> tuple[dict[str, Any], dict[str, Any], Path | None]:
    """As `read_with_defaults`: the file's own values, those that it shares, and the path of the shared file."""
    own = read_yaml(path)
    named = own.pop(DEFAULTS, None)
    if named is None:
        return own, {}, None
    if not isinstance(named, str) or not named or "\0" in named:
        raise HyperParamsError(f"{path}: {DEFAULTS} must name a YAML file; found {shown(named)}.")
    beside = find_yaml(path).parent / named
    file = beside if is_file(beside) else hparams_folder() / Path(named).name
    if not is_file(file):
        raise HyperParamsError(
            f"{path}: {DEFAULTS} names {named!r}, but neither {beside} nor {file} exists. Copy the shared file along, "
            f"or remove the key and give all values."
        )
    shared = read_yaml(file)
    name = own.get("alg_name", shared.get("alg_name"))
    every = {key for method in presets.own_methods() for key in _settings(method.hparams)}
    unknown = [key for key in shared if key not in every]
    if unknown:
        raise HyperParamsError(f"{file}: no method has a key '{unknown[0]}'.{did_you_mean(str(unknown[0]), every)}")
    method = presets.find_method(presets.canonical_name(name)) if isinstance(name, str) else None
    known = every if method is None else _settings(method.hparams)
    return own, {key: value for key, value in shared.items() if key in known}, file


def _settings(location: str) -> set[str]:
    return {item.name for item in fields(presets.located(location))}
