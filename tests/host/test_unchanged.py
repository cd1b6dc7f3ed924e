"""EasyEdit's own methods do what they did before this package was imported."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import plain_rome
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from easyedit_moe.host.placeholders import OPTIONAL


def test_rome_on_a_dense_model_is_the_same_without_us(
    host: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights bit-equal, and metrics and context templates equal, to a process that never saw this package."""
    folder = tmp_path / "tiny-llama"
    tiny_model("dense").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    plain_rome.edit(str(folder), tmp_path / "with")
    # EasyEdit looks itself whether bitsandbytes is there, so a mock of it would be taken for real.
    absent = [name for name in OPTIONAL if name != "bitsandbytes" and importlib.util.find_spec(name) is None]
    checkout = str(Path(host.__file__).parents[1])
    environment = {k: v for k, v in os.environ.items() if k not in ("EASYEDIT_HOME", "PYTHONPATH")}
    command = [sys.executable, plain_rome.__file__, checkout, str(folder), str(tmp_path / "without"), *absent]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, theirs = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("with", "without"))
    before = tiny_model("dense").state_dict()
    assert ours.keys() == theirs.keys() == before.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {name for name in ours if not torch.equal(ours[name], before[name])} == {
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)
    }
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("with", "without")]
    assert results[0] == results[1]
    assert results[0]["class"] == "BaseEditor"
    assert len(results[0]["templates"]) == 6


def test_its_table_keeps_its_own_methods(host: ModuleType) -> None:
    from easyeditor.editors.batch_editor import BatchEditor
    from easyeditor.models.rome.rome_main import apply_rome_to_model
    from easyeditor.util.alg_dict import ALG_DICT

    assert ALG_DICT["ROME"] is apply_rome_to_model
    assert [BatchEditor.is_batchable_method(name) for name in ("MEMIT", "FT", "ROME", "GRACE")] == [
        True, True, False, False
    ]  # fmt: skip
    for cls in ("ROMEHyperParams", "MEMITHyperParams", "FTHyperParams"):
        assert getattr(host, cls).__module__.startswith("easyeditor.")
