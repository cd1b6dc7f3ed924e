"""What a target owes to the requests that it was found with: the last digits, and the patch says which they were."""

from __future__ import annotations

from pathlib import Path

import pytest
from baselines import settings
from solving_editors import TOK, hparams
from tiny import facts, tiny_model

from easyedit_moe.editors import make_editor
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.files import load_patch
from easyedit_moe.targets.search import COMPANY, TargetSearch, TargetSettings

pytestmark = pytest.mark.usefixtures("no_editing_warnings")
FEW = TargetSettings(25, 0.2, 0.0625, 0.5, 4.0, 0.0, 256, "subject_last")


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
def test_company_changes_the_last_digits_only(family: str) -> None:
    search = TargetSearch(MoELayerView(tiny_model(family)), TOK, 2, ("Then:",), FEW, progress=False)
    together = search.find(facts(4))
    assert len(set(together.batches)) == 1
    for number, fact in list(enumerate(facts(4)))[::2]:
        alone = search.find([fact])
        assert alone.batches[0] not in together.batches
        error = (alone.delta[0] - together.delta[number]).norm() / together.delta[number].norm()
        assert error < COMPANY, float(error)
        assert bool(alone.reached[0]) == bool(together.reached[number])


def test_the_same_company_gives_the_same_bits_and_name() -> None:
    search = TargetSearch(MoELayerView(tiny_model()), TOK, 2, (), FEW, progress=False)
    one, other = search.find(facts(3)), search.find(facts(3))
    assert one.batches == other.batches
    assert one.delta.equal(other.delta)


def test_the_patch_says_what_was_found_together(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "targets"
    hp = hparams(data, target_cache_dir=str(folder))
    model, editor = tiny_model(), make_editor(hp, progress=False)

    def batches(count: int) -> list[str]:
        patch = editor.edit(model, TOK, facts(count)).patch
        patch.save(tmp_path / "patch.safetensors")
        patch.revert(model)
        return load_patch(tmp_path / "patch.safetensors").metadata["target_batches"]

    (first,) = batches(1)
    partly = batches(3)
    assert partly[0] == first, "read from the cache, it keeps the name of its company"
    assert partly[1] == partly[2] != first
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    assert len({*batches(3), first, *partly}) == 3, "all three together are a third company"


def test_of_other_methods_those_with_targets_say_so() -> None:
    for method, told in (("UnKE", True), ("MoE-FT", False)):
        patch = make_editor(settings(method), progress=False).edit(tiny_model(), TOK, facts(1)).patch
        assert ("target_batches" in patch.metadata) == told
