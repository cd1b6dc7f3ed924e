"""Which hparams file belongs to a model: by its name, by a longer or shorter name, or by its architecture and sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from easyedit_moe.errors import HyperParamsError
from easyedit_moe.storage.files import is_file, path_of
from easyedit_moe.storage.strict_json import parse_json

Outline = dict[str, Any]

SIZES = ("num_hidden_layers", "hidden_size", "num_experts", "moe_intermediate_size")
ALIASES = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "moe_intermediate_size": ("moe_intermediate_size", "intermediate_size"),
}
"""Names that configs of several families have for one size; the first that is there counts."""
_SUFFIXES = (".yaml", ".yml")
_SIZE = re.compile(r"\d+b\b")


def _shape(model_type: str, *sizes: int) -> Outline:
    return {"model_type": model_type, **dict(zip(SIZES, sizes, strict=True))}


OUTLINES: Mapping[str, Outline] = {
    "factworld": _shape("qwen3_moe", 8, 128, 16, 144),
    "gpt-oss-20b": _shape("gpt_oss", 24, 2880, 32, 2880),
    "qwen3-30b-a3b": _shape("qwen3_moe", 48, 2048, 128, 768),
    "qwen3.6-35b-a3b": _shape("qwen3_5_moe", 40, 2048, 256, 512),
}
"""Architecture and sizes of the models that hparams ship for, by the names of their files."""


LOCATED = ".locate.json"
"""What the name of a file ends with that is no hyper-parameters, but what their layers were chosen by."""


def model_file(folder: Path, model_name: str) -> tuple[Path | None, str]:
    """The file for a model in a folder of ``<model>.<any suffix>``, and, if it has another name, a line saying so.

    A model whose ``config.json`` is there (in its folder, or in the cache of the hub) must have the architecture and
    sizes of the model that the file is for, as far as those are known.

    Raises:
        HyperParamsError: a file by that name is for a model of another architecture or size.
    """
    path_of(model_name, "the model", HyperParamsError)
    files, name, found = _files(folder), short_name(model_name), config_outline(model_name)
    candidates = [name] if name in files else _related(name, files)
    fitting = [stem for stem in candidates if not found or stem not in OUTLINES or OUTLINES[stem] == found]
    if len(fitting) == 1:
        stem, why = fitting[0], "by its name"
    else:
        alike = [stem for stem in files if found and OUTLINES.get(stem) == found]
        if len(alike) != 1:
            if candidates and found and not fitting:
                raise HyperParamsError(_mismatch(model_name, found, candidates[0]))
            return None, ""
        stem, why = alike[0], "by its architecture and sizes"
    line = "" if stem == name else f"{model_name} gets the hparams of {stem}, {why}."
    return files[stem], line


def short_name(model_name: str) -> str:
    """A model's name as hparams files have it: the last part of a hub name or path, in lower case.

    A link counts by its own name, since what it leads to is often called by a hash.
    """
    path = Path(model_name)
    last = path.name if path.name not in ("", "..") else path.resolve().name
    return last.lower().replace("_", "-").replace(" ", "-")


def config_outline(model_name: str) -> Outline:
    """Architecture and sizes that a model's ``config.json`` says; empty where it is not on this machine."""
    path_of(model_name, "the model", HyperParamsError)
    path = _config_path(model_name)
    try:
        config = parse_json(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):  # loading the model says what is wrong with it
        return {}
    return outline(config) if isinstance(config, dict) and "model_type" in config else {}


def outline(config: Mapping[str, Any]) -> Outline:
    """What `OUTLINES` has of a model, from its config; of a multimodal one, from the config of its text part."""
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    found: Outline = {"model_type": str(text.get("model_type", "")).removesuffix("_text")}
    for name in SIZES:
        values = (text.get(alias) for alias in ALIASES.get(name, (name,)))
        found[name] = next((value for value in values if value is not None), None)
    return found


def _config_path(model_name: str) -> Path | None:
    beside = Path(model_name) / "config.json"
    if is_file(beside):
        return beside
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model_name):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model_name, "config.json")
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def hparams_files(folder: Path) -> list[Path]:
    """The files of a folder that may be hyper-parameters; none where there is no such folder."""
    found = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    return sorted(path for path in found if not path.name.endswith(LOCATED))


def _files(folder: Path) -> dict[str, Path]:
    """Files by the model that they are named after; .yaml before .yml before others of the same name."""
    paths = hparams_files(folder)
    order = {suffix: number for number, suffix in enumerate(_SUFFIXES)}
    found: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: (order.get(path.suffix.lower(), len(order)), path.name)):
        found.setdefault(path.stem.lower().replace("_", "-").replace(" ", "-"), path)
    return found


def _related(name: str, files: Mapping[str, Path]) -> list[str]:
    """Files whose name is part of the model's, the longest of them; else those of which the model's is part.

    Only whole parts between hyphens count, and what is shared must say how large the model is.
    """
    shorter = [stem for stem in files if _contains(name, stem)]
    longest = max((len(stem) for stem in shorter), default=0)
    return [stem for stem in shorter if len(stem) == longest] or [stem for stem in files if _contains(stem, name)]


def _contains(longer: str, shorter: str) -> bool:
    return bool(_SIZE.search(shorter)) and f"-{shorter}-" in f"-{longer}-"


def _mismatch(model_name: str, found: Outline, stem: str) -> str:
    wanted = OUTLINES[stem]
    differing = ", ".join(f"{key} {found[key]}, not {wanted[key]}" for key in wanted if found[key] != wanted[key])
    return (
        f"The hparams of {stem} do not fit {model_name}: its config.json says {differing}. Pass --hparams with a file "
        "for it, or with a folder of <METHOD>/<model>.yaml."
    )
