"""What tests of the solving editors share: their hparams on tiny models, an edit, and what it may change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor, nn

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
from easyedit_moe.moe.capture import capture_facts
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.targets.search import fact_contexts

METHODS = {
    "MoTE": MoTEEditor, "MoEEdit-BCD": MoEEditEditor, "BCD+speedup": BCDSpeedupEditor, "Global": GlobalEditor,
    "Global+speedup": GlobalSpeedupEditor, "MoE-MEMIT": MoEMEMITEditor, "MoE-AlphaEdit": MoEAlphaEditEditor,
    "MoE-ROME": MoEROMEEditor,
}  # fmt: skip
VARIANTS = [*METHODS, "MoTE/update", "MoTE/once", "Global/last", "MoEEdit-BCD/once"]
TOK = tiny_tokenizer()


def hparams(data: Path, variant: str = "Global", /, **changes: Any) -> MoEHyperParams:
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


def plain_ridge(data: Path, variant: str = "Global", /, **changes: Any) -> MoEHyperParams:
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


def stacked(model: nn.Module, layer: int) -> Tensor:
    return MoELayerView(model).layers[layer].experts.stacked(torch.float64)


def captured(model: nn.Module, hp: MoEHyperParams, layer: int, facts: Sequence[Any]) -> tuple[Any, Tensor]:
    contexts = [c for f in parse_requests(facts) for c in fact_contexts(TOK, f, hp.context_prefixes, hp.fact_token)]
    state = capture_facts(MoELayerView(model), [c.ids for c in contexts], [c.fact for c in contexts], [layer],
                          [hp.layers[-1]], 0)  # fmt: skip
    return state.keys[layer], state.outputs[hp.layers[-1]]


def dense_ridge(keys: Any, residual: Tensor, lambda_reg: float) -> Tensor:
    """``argmin ||R - Delta Psi||^2 + lambda ||Delta||^2`` as ``[E, d, h]``, by the normal equations of Psi."""
    psi = keys.dense(8)
    gram = psi.T @ psi + lambda_reg * torch.eye(psi.shape[1], dtype=torch.float64)
    delta = torch.linalg.solve(gram, psi.T @ residual.double())
    return delta.T.reshape(residual.shape[1], 8, -1).transpose(0, 1)


def add(model: nn.Module, layer: int, change: Tensor) -> None:
    with torch.no_grad():
        model.model.layers[layer].mlp.experts.down_proj += change.float()


def check_equal(model: nn.Module, expected: nn.Module, layers: Sequence[int]) -> None:
    for layer in layers:
        start, ours, theirs = (stacked(m, layer) for m in (tiny_model(), model, expected))
        assert (theirs - start).norm() > 1e-3
        assert (ours - theirs).norm() < 1e-4 * (theirs - start).norm()
