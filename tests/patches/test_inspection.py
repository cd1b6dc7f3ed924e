from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_patches import EXPERTS, new_values, update_for, write, write_tensors
from solving_editors import plain_ridge
from tiny import facts, requests, tiny_model, tiny_tokenizer

from easyedit_moe.editors import make_editor
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.files import load_patch
from easyedit_moe.patches.inspection import describe, relative_sizes
from easyedit_moe.patches.merging import merge


def strict(value: Any) -> Any:
    return json.loads(json.dumps(value, allow_nan=False))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
def test_relative_sizes_are_those_of_the_weights(family: str, tmp_path: Path) -> None:
    model, start = tiny_model(family), MoELayerView(tiny_model(family))
    parts = [write(model, (1, 2), seed=0), write(model, (2,), seed=1, experts=(3, 4))]
    updates = [update_for(start, 1), update_for(start, 2)], [update_for(start, 2, seed=1, experts=(3, 4))]
    intended = {1: updates[0][0].dense(8), 2: updates[0][1].dense(8) + updates[1][0].dense(8)}
    merge(parts).save(tmp_path / "p.safetensors")
    found = relative_sizes(load_patch(tmp_path / "p.safetensors"))
    assert {layer: sorted(sizes) for layer, sizes in found.items()} == {1: [0, 3, 6], 2: [0, 3, 4, 6]}
    for layer, sizes in found.items():
        for expert, size in sizes.items():
            weight = start.layers[layer].experts.read(expert).double()
            assert size == pytest.approx(float(intended[layer][expert].norm() / weight.norm()), rel=1e-4)


def test_a_patch_of_an_editor(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "p.safetensors"
    patch = make_editor(plain_ridge(tmp_path), progress=False).edit(model, tiny_tokenizer(), facts(2)).patch
    patch.parent, patch.warnings = "0011223344556677", ["told"]
    patch.metadata["diagnosis"] = {"share": 0.5}
    patch.save(path, keep_originals=True)
    found = strict(describe(load_patch(path), path))
    assert found["methods"] == ["Global"]
    assert [fact["prompt"] for fact in found["facts"]] == [request["prompt"] for request in requests(2)]
    assert (found["id"], found["parent"], found["base"]) == (patch.id, patch.parent, patch.base)
    assert found["fingerprint"] == patch.fingerprint
    assert [entry["layer"] for entry in found["touched"]] == patch.layers
    assert found["touched"][0]["name"] == f"model.layers.{patch.layers[0]}.mlp.experts"
    assert all(entry["relative_size"] > 0 for layer in found["touched"] for entry in layer["experts"])
    assert found["bytes"] == path.stat().st_size
    assert found["originals"] is True
    assert found["warnings"] == ["told"]
    assert [note["diagnosis"] for note in found["notes"]] == [{"share": 0.5}]
    assert found["settings"][0]["alg_name"] == "Global"
    assert found["versions"]["torch"] == torch.__version__
    assert describe(patch)["bytes"] is None


def test_whole_tensors() -> None:
    model, start = tiny_model(), tiny_model()
    values = new_values(model)
    found = strict(describe(write_tensors(model, values)))
    assert found["kind"] == "whole tensors"
    assert [entry["name"] for entry in found["touched"]] == sorted(values)
    for entry in found["touched"]:
        before = start.get_parameter(entry["name"]).detach()
        size = float((values[entry["name"]] - before).norm() / before.norm())
        assert entry["relative_size"] == pytest.approx(size, rel=1e-4)
        assert entry["shape"] == list(before.shape)


def test_what_is_not_known_is_none() -> None:
    patch = write(tiny_model())
    patch.reports = []
    found = strict(describe(patch))
    assert found["rounding_loss"] is None
    assert [e["relative_size"] for e in found["touched"][0]["experts"]] == [None] * len(EXPERTS)
    assert found["methods"] == found["facts"] == found["merged"] == []
