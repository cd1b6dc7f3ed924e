"""Settings of EasyEdit's own methods for tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from easyedit_moe.host.baseline_hparams import BaselineHyperParams
from easyedit_moe.hparams import read_yaml


def settings(data: Path, method: str, **changes: Any) -> BaselineHyperParams:
    """The shipped settings for the bundled model, with few steps on few layers of a tiny one."""
    values = read_yaml(f"{method}/factworld")
    few = {
        "layers": [1] if method == "ROME" else [1, 2], "v_num_grad_steps": 3, "v_loss_layer": 3, "num_steps": 3,
        "lm_head_module": "lm_head", "mom2_dataset": str(data / "corpus.txt"), "stats_dir": str(data / "stats"),
        "nullspace_threshold": 1e-2, "model_name": "tiny", "batch_size": 10,
        "inner_params": ["model.layers[1].self_attn.o_proj.weight"], "n_iter": 3,
    }  # fmt: skip
    known = {name: value for name, value in few.items() if name in values}
    return BaselineHyperParams(method, values | known | changes)
