"""EasyEdit's ROME on a dense model, as its own README does it: run as a script, without this package.

    python plain_rome.py CHECKOUT MODEL OUT PACKAGE...

Absent PACKAGEs are mocked, since EasyEdit imports them all.
"""

from __future__ import annotations

import json
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch

SETTINGS = {
    "alg_name": "ROME", "device": "cpu", "layers": [1, 2], "fact_token": "subject_last", "v_num_grad_steps": 4,
    "v_lr": 0.5, "v_loss_layer": 3, "v_weight_decay": 1e-3, "clamp_norm_factor": 4, "kl_factor": 0.0625,
    "mom2_adjustment": False, "context_template_length_params": [[5, 5]],
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj", "layer_module_tmp": "model.layers.{}",
    "mlp_module_tmp": "model.layers.{}.mlp", "attn_module_tmp": "model.layers.{}.self_attn",
    "ln_f_module": "model.norm", "lm_head_module": "lm_head", "mom2_dataset": "wikipedia", "mom2_n_samples": 1,
    "mom2_dtype": "float32", "stats_dir": "stats",
}  # fmt: skip
FACTS = {
    "prompts": ["Danielle Darrieux speaks", "Angola is in"],
    "target_new": ["Polish", "Russia"],
    "subject": ["Danielle Darrieux", "Angola"],
    "rephrase_prompts": ["We know that Danielle Darrieux speaks", "Angola lies in"],
    "locality_inputs": {"near": {"prompt": ["Kenya is in", "Rome is in"], "ground_truth": ["Africa", "Japan"]}},
}


def edit(model: str, out: Path) -> None:
    """Edit and write all weights and metrics to ``out``."""
    from easyeditor import BaseEditor, ROMEHyperParams
    from easyeditor.models.rome import rome_main

    rome_main.CONTEXT_TEMPLATES_CACHE = None
    editor = BaseEditor.from_hparams(ROMEHyperParams(**SETTINGS, model_name=model))
    torch.manual_seed(0)
    metrics, edited, _ = editor.edit(**json.loads(json.dumps(FACTS)), sequential_edit=True)
    for entry in metrics:
        entry.pop("time", None)
    result = {"class": type(editor).__name__, "side": editor.tok.padding_side, "metrics": metrics}
    result |= {"templates": rome_main.CONTEXT_TEMPLATES_CACHE}
    rome_main.CONTEXT_TEMPLATES_CACHE = None
    out.mkdir()
    torch.save(edited.state_dict(), out / "weights.pt")
    (out / "result.json").write_text(json.dumps(result))


class _Mocks(MetaPathFinder, Loader):
    def __init__(self, packages: list[str]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in self.packages else None

    def create_module(self, spec: ModuleSpec) -> Any:
        return MagicMock(name=spec.name)

    def exec_module(self, module: Any) -> None:
        pass


if __name__ == "__main__":
    import datasets  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoProcessor  # noqa: F401  (before the mocks, or it believes in torchvision)

    torch.set_num_threads(1)
    sys.path.insert(0, sys.argv[1])
    sys.meta_path.append(_Mocks(sys.argv[4:]))
    edit(sys.argv[2], Path(sys.argv[3]))
    assert not any(name.startswith("easyedit_moe") for name in sys.modules)
