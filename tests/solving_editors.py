"""What tests of the solving editors share: their hparams on tiny models, an edit, and what it may change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_tokenizer
from torch import nn

from easyedit_moe.editors import (
    BCDSpeedupEditor,
    EditResult,
    GlobalEditor,
    GlobalSpeedupEditor,
    MoEAlphaEditEditor,
    MoEEditEditor,
    MoEMEMITEditor,
    MoEROMEEditor,
    MoTEEditor,
    make_editor,
)
from easyedit_moe.facts.requests import parse_requests
from easyedit_moe.hparams import MoEHyperParams, hyperparams_class

METHODS = {
    "MoTE": MoTEEditor, "MoEEdit-BCD": MoEEditEditor, "BCD+speedup": BCDSpeedupEditor, "Global": GlobalEditor,
    "Global+speedup": GlobalSpeedupEditor, "MoE-MEMIT": MoEMEMITEditor, "MoE-AlphaEdit": MoEAlphaEditEditor,
    "MoE-ROME": MoEROMEEditor,
}  # fmt: skip
VARIANTS = [*METHODS, "MoTE/update"]
TOK = tiny_tokenizer()


def hparams(data: Path, variant: str = "Global", **changes: Any) -> MoEHyperParams:
    method, _, spread = variant.partition("/")
    values: dict[str, Any] = {
        "alg_name": method, "model_name": "tiny", "layers": [2] if method == "MoE-ROME" else [1, 2], "dtype": "float32",
        "v_num_grad_steps": 4, "v_lr": 0.2, "clamp_norm_factor": 4, "max_length": 64,
        "mom2_dataset": str(data / "corpus.txt"), "stats_dir": str(data / "stats"), "lambda_reg": 0.01,
    }  # fmt: skip
    if spread:
        values["spread"] = spread
    if method not in ("MoE-MEMIT", "MoE-ROME"):
        values |= {"nullspace_threshold": 0.05, "nullspace_relative": True}
    return hyperparams_class(method).from_dict(values | changes)


def plain_ridge(data: Path, variant: str = "Global", **changes: Any) -> MoEHyperParams:
    """Identity metric, and a basis that leaves nothing out: then the solution has a closed form."""
    full = {"rank_in": 1.0, "whitening": "none"} if variant.startswith("MoTE") else {}
    return hparams(data, variant, **({"metric": "identity", "mom2_dataset": "nowhere.txt"} | full | changes))


def edit(model: nn.Module, hp: MoEHyperParams, facts: Sequence[Any], **options: Any) -> EditResult:
    return make_editor(hp, progress=False).edit(model, TOK, parse_requests(facts), **options)


def changed_parameters(before: dict[str, Any], model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if not torch.equal(p, before["parameters"][n])}


def down_projections(model: nn.Module, layers: Sequence[int]) -> set[str]:
    return {
        n
        for n, _ in model.named_parameters()
        if any(f"layers.{i}." in n for i in layers)
        and "experts" in n
        and n.split("experts.")[-1].removesuffix(".weight").endswith("down_proj")
        and "shared" not in n
    }
