"""Models that accelerate spread or offloaded, and dtypes: the same edits as on one device."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXTS, facts, tiny_model, tiny_tokenizer
from torch import Tensor, nn

from easyedit_moe.editors import EditResult, make_editor
from easyedit_moe.errors import LayoutError
from easyedit_moe.hparams import hyperparams_class
from easyedit_moe.moe.layers import MoELayerView

TOK = tiny_tokenizer()
FAMILIES = ("qwen3_moe", "gpt_oss", "modulelist")


pytestmark = pytest.mark.usefixtures("no_editing_warnings")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(TEXTS * 3), encoding="utf-8")
    return path


def edit(model: nn.Module, corpus: Path, alg_name: str = "Global", **changes: Any) -> EditResult:
    values = {
        "alg_name": alg_name, "model_name": "tiny", "layers": [1, 2], "dtype": "float32", "v_num_grad_steps": 5,
        "mom2_dataset": str(corpus), "stats_dir": str(corpus.parent / "stats"), "clamp_norm_factor": 4.0,
        "context_prefixes": ["The fox: "], "nullspace_relative": True, "nullspace_threshold": 1e-3, "lambda_reg": 1e-3,
    }  # fmt: skip
    hp = hyperparams_class(alg_name).from_dict(values | changes)
    return make_editor(hp, progress=False).edit(model, TOK, facts(4))


def spread(model: nn.Module, folder: Path, **places: str) -> nn.Module:
    """Embedding, first and last layer and head on disk, as where a GPU is too small; the edited layers in memory."""
    accelerate = pytest.importorskip("accelerate")
    parts = [
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in range(4)),
    ]
    away = ("model.embed_tokens", "model.layers.0", "model.layers.3", "lm_head")
    device_map = {part: "disk" if part in away else "cpu" for part in parts} | places
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return accelerate.dispatch_model(
            model, device_map, main_device="cpu", offload_dir=str(folder / "offload"), force_hooks=True
        )


@pytest.mark.parametrize("alg_name", ["Global", "MoTE"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_are_not_edited_may_be_offloaded(family: str, alg_name: str, corpus: Path, tmp_path: Path) -> None:
    plain = tiny_model(family)
    wanted = edit(plain, corpus, alg_name)
    model = spread(tiny_model(family), tmp_path)
    assert all(p.is_meta for p in model.model.layers[3].parameters())
    before = {i: [w.clone() for _, w in MoELayerView(model).layers[i].experts.parameters()] for i in (1, 2)}
    found = edit(model, corpus, alg_name)
    torch.testing.assert_close(found.targets[0].delta, wanted.targets[0].delta, atol=1e-4, rtol=1e-4)
    for index in (1, 2):
        ours, theirs = (MoELayerView(m).layers[index].experts for m in (model, plain))
        for (_, weight), (_, reference) in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(weight, reference, atol=1e-4, rtol=1e-3)
    assert all(p.is_meta for p in model.model.layers[3].parameters())
    found.patch.revert(model)
    for index in (1, 2):
        parameters = MoELayerView(model).layers[index].experts.parameters()
        assert all(torch.equal(a, b) for (_, a), b in zip(parameters, before[index], strict=True))


def test_modules_that_come_from_elsewhere_for_each_forward(corpus: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    wanted = edit(tiny_model(), corpus)
    model = tiny_model()
    for part in (model.model.embed_tokens, model.model.layers[0], model.model.layers[3], model.lm_head):
        accelerate.cpu_offload(part, "cpu")
    assert model.lm_head.weight.is_meta
    found = edit(model, corpus)
    torch.testing.assert_close(found.targets[0].delta, wanted.targets[0].delta, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_offloaded_layer_is_not_edited(family: str, corpus: Path, tmp_path: Path) -> None:
    model = spread(tiny_model(family), tmp_path, **{"model.layers.2": "disk"})
    before = MoELayerView(model).layers[1].experts.read(3).clone()
    with pytest.raises(LayoutError, match=r"layers\.2.*offloaded.*every layer that is edited on a GPU or on the CPU"):
        edit(model, corpus)
    assert torch.equal(MoELayerView(model).layers[1].experts.read(3), before)
    assert not (corpus.parent / "stats").exists()


def down_projections(model: nn.Module) -> Tensor:
    view = MoELayerView(model)
    return torch.cat([view.layers[i].experts.stacked().flatten() for i in (1, 2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("spread_by", ["residual", "update"])
def test_every_dtype(family: str, dtype: torch.dtype, spread_by: str, corpus: Path) -> None:
    """In half precision the edit is the one in single precision, up to rounding."""
    how = {"residual": "Global", "update": "Global+speedup"}[spread_by]
    moved, found = [], []
    for model in (tiny_model(family), tiny_model(family, dtype=dtype)):
        before = down_projections(model)
        found.append(edit(model, corpus, how, v_num_grad_steps=10).targets[0].delta)
        moved.append(down_projections(model) - before)
        assert len({p.dtype for p in model.parameters()}) == 1
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > {torch.bfloat16: 0.9}.get(dtype, 0.99)
    reference, delta = found
    assert delta.dtype == torch.float32
    limit = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}[dtype]
    assert (delta - reference).norm() < limit * reference.norm()
