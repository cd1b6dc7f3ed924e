"""Knowledge editing for Mixture-of-Experts language models: MoTE, MoEEdit-BCD and Global, stand-alone or in EasyEdit.

Importing this package is light: torch, transformers and the editors load when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LOCATIONS = {
    "MoTEHyperParams": "hparams",
    "MoEEditHyperParams": "hparams",
    "GlobalHyperParams": "hparams",
    "FTHyperParams": "hparams",
    "LoRAHyperParams": "hparams",
    "UnKEHyperParams": "hparams",
    "MEMoEHyperParams": "hparams",
    "load_hyperparams": "hparams",
    "MoEEditor": "editor",
    "EditRequest": "facts.requests",
    "MoELayerView": "moe.layers",
    "WeightPatch": "patches.weights",
    "TensorPatch": "patches.tensors",
    "load_model": "moe.loading",
    "make_editor": "editors",
    "method_names": "editors",
    "register": "host",
    "apply_mote_to_model": "editors",
    "apply_moeedit_to_model": "editors",
    "apply_bcd_speedup_to_model": "editors",
    "apply_global_to_model": "editors",
    "apply_global_speedup_to_model": "editors",
    "apply_moe_memit_to_model": "editors",
    "apply_moe_alphaedit_to_model": "editors",
    "apply_moe_rome_to_model": "editors",
    "apply_moe_ft_to_model": "editors",
    "apply_moe_ft_l_to_model": "editors",
    "apply_moe_lora_to_model": "editors",
    "apply_adalora_to_model": "editors",
    "apply_unke_to_model": "editors",
    "apply_memoe_to_model": "editors",
    "MoEAdapter": "adapters.moe_adapter",
    "attach": "adapters.attachment",
    "detach": "adapters.attachment",
}

__all__ = ["__version__", *_LOCATIONS]


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module 'easyedit_moe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"easyedit_moe.{_LOCATIONS[name]}"), name)


from easyedit_moe.host.watch import watch  # noqa: E402  (it needs nothing of the above, and only the standard library)

watch()


def __dir__() -> list[str]:
    return sorted(__all__)
