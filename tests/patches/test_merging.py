from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_patches import new_values, some_names, write, write_tensors
from tiny import assert_same_state, state_of, tiny_model
from torch import nn

from easyedit_moe.errors import PatchError
from easyedit_moe.patches.files import load_patch
from easyedit_moe.patches.merging import merge
from easyedit_moe.workflow.merge import merge as merge_files

FAMILIES = ["qwen3_moe", "gpt_oss", "modulelist"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight_chain(model: nn.Module) -> list[Any]:
    """Three patches that overlap in layers and experts."""
    return [
        write(model, (1, 2), seed=0, experts=(0, 3)),
        write(model, (2, 3), seed=1, experts=(3, 4)),
        write(model, (1, 2), seed=2, experts=(3, 7)),
    ]


def tensor_chain(model: nn.Module) -> list[Any]:
    names = some_names(model)
    parts = [names[:6], names[3:], names[1:4]]
    return [write_tensors(model, new_values(model, seed, part)) for seed, part in enumerate(parts)]


CHAINS = pytest.mark.parametrize("chain", [weight_chain, tensor_chain])


def loaded(patches: Sequence[Any], folder: Path, keep_originals: Sequence[int] = ()) -> list[Any]:
    found = []
    for i, patch in enumerate(patches):
        if i:
            patch.parent = patches[i - 1].id
        patch.save(folder / f"{i}.safetensors")
        found.append(load_patch(folder / f"{i}.safetensors"))
    return found


@CHAINS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_chain_is_exact(chain: Any, dtype: torch.dtype, family: str, tmp_path: Path) -> None:
    model, copy = tiny_model(family, dtype=dtype), tiny_model(family, dtype=dtype)
    start = state_of(copy)
    parts = loaded(chain(model), tmp_path)
    merge(parts).save(tmp_path / "merged.safetensors")
    merged = load_patch(tmp_path / "merged.safetensors")
    merged.apply(copy)
    assert_same_state(state_of(model), state_of(copy))
    merged.revert(copy)
    assert_same_state(start, state_of(copy))
    load_patch(tmp_path / "merged.safetensors").revert(model, base=copy)
    assert_same_state(start, state_of(model))


@CHAINS
def test_what_a_merged_patch_says_of_itself(chain: Any, tmp_path: Path) -> None:
    parts = loaded(chain(tiny_model()), tmp_path)
    parts[0].parent = "fedcba9876543210"
    parts[2].warnings = ["something"]
    merged = merge(parts)
    assert (merged.base, merged.parent, merged.fingerprint) == (parts[0].base, parts[0].parent, parts[0].fingerprint)
    assert merged.metadata["merged"] == [part.id for part in parts]
    assert [part["note"] for part in merged.metadata["parts"]] == ["test"] * 3
    assert merged.warnings == ["something"]
    assert merged.reports == [report for part in parts for report in part.reports]
    assert merged.id not in {part.id for part in parts}
    twice = merge([merge(parts[:2]), parts[2]])
    assert (twice.id, twice.metadata) == (merged.id, merged.metadata)


@CHAINS
def test_gaps_and_wrong_orders_are_refused(chain: Any, tmp_path: Path) -> None:
    first, second, third = loaded(chain(tiny_model()), tmp_path)
    with pytest.raises(PatchError, match="Wrong order"):
        merge([second, first, third])
    with pytest.raises(PatchError, match=f"made on patch {second.id}, which is missing in the chain"):
        merge([first, third])
    for patch in (first, second, third):
        patch.parent = None
    for wrong in ([second, first], [first, third, second], [first, first]):
        with pytest.raises(PatchError, match="does not begin where the patches before it end"):
            merge(wrong)
    with pytest.raises(PatchError, match="at least one"):
        merge([])


@CHAINS
def test_one_patch_is_a_chain(chain: Any, tmp_path: Path) -> None:
    first = loaded(chain(tiny_model()), tmp_path)[0]
    assert merge([first]).id == first.id


def test_different_models(tmp_path: Path) -> None:
    one, other = write(tiny_model(), [1]), write(tiny_model(seed=1), [2])
    with pytest.raises(PatchError, match="of the same model"):
        merge([one, other])


def test_both_kinds_are_not_merged(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(PatchError, match="can't be merged into one patch"):
        merge([write(model), write_tensors(model, new_values(model))])


def test_whole_tensors_are_not_folded(tmp_path: Path) -> None:
    model, files = tiny_model(), [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for file in files:
        write_tensors(model, new_values(model)).save(file)
    with pytest.raises(PatchError, match="can't be folded"):
        merge_files(files, tmp_path / "both.safetensors", fold=True)
    assert sorted(tmp_path.iterdir()) == files


@CHAINS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_originals_are_merged(chain: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model, start = tiny_model("gpt_oss", dtype=dtype), state_of(tiny_model("gpt_oss", dtype=dtype))
    applied = []

    def keep(patch: Any) -> Any:
        patch.save(tmp_path / f"{len(applied)}.safetensors", keep_originals=True)
        applied.append(patch)
        return load_patch(tmp_path / f"{len(applied) - 1}.safetensors")

    names = some_names(model)
    parts = []
    for seed in range(3):
        made = (
            write(model, (1, 2), seed=seed, experts=(seed, 3))
            if chain is weight_chain
            else write_tensors(model, new_values(model, seed, names[seed : seed + 4]))
        )
        parts.append(keep(made))
    edited = state_of(model)
    merged = merge(parts)
    assert merged.flips
    merged.revert(model)
    assert_same_state(start, state_of(model))
    merged.apply(model)
    assert_same_state(edited, state_of(model))
    parts[1].flips = {}
    assert not merge(parts).flips


@CHAINS
def test_applied_patches_make_an_applied_one(chain: Any, tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    start = state_of(tiny_model(dtype=torch.bfloat16))
    parts = chain(model)
    edited = state_of(model)
    merged = merge(parts)
    merged.save(tmp_path / "p.safetensors", keep_originals=True)
    again = load_patch(tmp_path / "p.safetensors")
    again.revert(model)
    assert_same_state(start, state_of(model))
    again.apply(model)
    assert_same_state(edited, state_of(model))
    merged.revert(model)
    assert_same_state(start, state_of(model))
    with pytest.raises(PatchError, match="Some of these patches are applied"):
        merge([*loaded(parts[:2], tmp_path), chain(model)[2]])
