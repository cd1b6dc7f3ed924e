"""Patches of experts that lie below one another in one matrix (DBRX)."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from solving_editors import TOK, hparams
from tiny import assert_same_state, facts, state_of
from torch import nn

from benchmarks.family_models import tiny_model
from easyedit_moe.editors import make_editor
from easyedit_moe.editors.base import EditResult
from easyedit_moe.errors import EditingWarning
from easyedit_moe.patches.weights import WeightPatch

pytest.importorskip("transformers.models.dbrx")


def edited(method: str, folder: Path, **changes: object) -> tuple[nn.Module, dict[str, object], EditResult]:
    model = tiny_model("dbrx")
    before = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)
        hp = hparams(folder, method, metric="identity", **changes)
        result = make_editor(hp, progress=False).edit(model, TOK, facts(2))
    return model, before, result


@pytest.mark.parametrize("method", ["Global", "MoTE"])
def test_a_patch_is_saved_applied_elsewhere_and_reverted(method: str, tmp_path: Path) -> None:
    whitening = {"whitening": "none"} if method == "MoTE" else {}
    model, before, result = edited(method, tmp_path, **whitening)
    after = state_of(model)
    changed = {n for n, value in before["parameters"].items() if not torch.equal(value, after["parameters"][n])}
    assert changed == {f"transformer.blocks.{layer}.ffn.experts.mlp.w2" for layer in (1, 2)}
    copies = result.patch.weights_copy(model)
    assert copies.keys() == changed
    assert all(torch.equal(value, before["parameters"][name]) for name, value in copies.items())
    result.patch.save(tmp_path / "patch.safetensors")
    other = tiny_model("dbrx")
    loaded = WeightPatch.load(tmp_path / "patch.safetensors")
    loaded.apply(other)
    assert_same_state(after, state_of(other))
    for patch, edited_model in ((result.patch, model), (loaded, other)):
        patch.revert(edited_model)
        assert_same_state(before, state_of(edited_model))
