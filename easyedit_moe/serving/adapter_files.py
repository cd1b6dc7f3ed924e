"""An adapter's folder: what PEFT and servers load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from easyedit_moe.errors import PatchError
from easyedit_moe.storage.files import write_text
from easyedit_moe.storage.strict_json import write_json
from easyedit_moe.storage.tensors import write_tensors

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NOTES = "README.md"


def adapter_config(
    base: str, rank: int, peft_version: str, modules: Sequence[str] = (), parameters: Sequence[str] = ()
) -> dict[str, Any]:
    """The content of adapter_config.json: a plain LoRA with a scale of 1.

    Args:
        base: name or folder of the base model.
        rank: of every pair.
        peft_version: the version whose layout the tensors have.
        modules: ``target_modules``.
        parameters: ``target_parameters``: full names of 3-D parameters.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "peft_version": peft_version,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": list(modules),
        "target_parameters": list(parameters) or None,
    }


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], notes: str) -> None:
    """Write tensors, configuration and notes into a folder.

    Raises:
        WriteError: they can't be written.
    """
    write_tensors(folder / TENSORS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, config, indent=2)
    write_text(folder / NOTES, notes)


def is_turned(peft_version: str) -> bool:
    """Whether a version of PEFT reads the adapter of a parameter ``[E, d, h]`` as if it were ``[E, h, d]``.

    0.18.0 and 0.18.1 do; 0.20.0 to 0.21.2 read the model's ``is_transposed``.

    Raises:
        PatchError: a version that reads no such adapter rightly, or no version at all.
    """
    parts = peft_version.split(".")
    if len(parts) < 2 or not all(part.isdecimal() for part in parts[:2]):
        raise PatchError(f"A version of PEFT is a text such as 0.21.2; found {peft_version!r}.")
    version = (int(parts[0]), int(parts[1]))
    if version == (0, 19) or version < (0, 18):
        raise PatchError(
            f"PEFT {peft_version} can't load an adapter of packed experts on a model of transformers 5. Use 0.18, or "
            "0.20 or newer, and name it by --peft-version."
        )
    return version == (0, 18)
