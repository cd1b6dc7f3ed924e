"""The training script: seeded, and resumable without a difference."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[2] / "examples" / "train_factworld.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_factworld", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "recall", lambda *_: 0.0)  # a pass over 11 200 prompts that is not what is tested
    return module


def _args(out: Path) -> argparse.Namespace:
    values = {"steps": 4, "batch": 2, "lr": 3e-3, "weight_decay": 0.1, "aux": 0.03, "smoothing": 0.1, "seed": 0}
    return argparse.Namespace(out=str(out), vocab_size=2000, threads=1, checkpoint_every=2, **values)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.train(_args(tmp_path / "whole"))

    save = script.save_checkpoint

    def stop_after_saving(*args: object) -> None:
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "save_checkpoint", stop_after_saving)
    with pytest.raises(KeyboardInterrupt):
        script.train(_args(tmp_path / "stopped"))
    assert script.checkpoint_step(tmp_path / "stopped" / "checkpoint.safetensors") == 2
    monkeypatch.setattr(script, "save_checkpoint", save)
    script.train(_args(tmp_path / "stopped"))

    whole, stopped = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    for name in ("counterfact.json", "easyedit.json", "corpus.txt", "facts.json", "report.json"):
        assert (tmp_path / "whole" / "data" / name).exists()


def test_batches_depend_on_seed_and_step_only(script: ModuleType) -> None:
    world = script.fw.build_world(0)
    tokenizer = script.train_tokenizer(script.fw.fact_sentences(world, world.subjects[:20]), 400)
    first, again = (script.Batches(world, tokenizer, 0, 2) for _ in range(2))
    ids, weights = first.batch(7)
    assert torch.equal(ids, again.batch(7)[0])
    assert not torch.equal(ids, first.batch(8)[0])
    assert not torch.equal(ids, script.Batches(world, tokenizer, 1, 2).batch(7)[0])
    assert weights.unique().tolist() == pytest.approx([0.1, 1.0])
