"""Where YAML files of hyper-parameters are found, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from easyedit_moe.errors import HyperParamsError, did_you_mean


def hparams_folder() -> Path:
    """Folder of the YAML files that ship with the package: ``<METHOD>/<model>.yaml``."""
    package = Path(__file__).parent.parent
    installed = package / "hparams_yaml"
    return installed if installed.is_dir() else package.parent / "hparams"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping; see :meth:`MoEHyperParams.from_hparams` for how the path is resolved."""
    candidates = [Path(path), hparams_folder() / str(path), hparams_folder() / f"{path}.yaml"]
    if Path(path).parts[:1] == ("hparams",):
        candidates.append(hparams_folder() / Path(*Path(path).parts[1:]))
    found = next((c for c in candidates if c.is_file()), None)
    if found is None:
        shipped = sorted(str(p.relative_to(hparams_folder())) for p in hparams_folder().glob("*/*.yaml"))
        raise HyperParamsError(f"The hparams file {path} does not exist.{did_you_mean(str(path), shipped)}")
    try:
        values = yaml.safe_load(found.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise HyperParamsError(f"{found} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise HyperParamsError(f"{found} must hold a mapping of names to values.")
    return values
