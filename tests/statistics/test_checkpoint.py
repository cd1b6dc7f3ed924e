"""Runs of statistics that are interrupted and taken up, and runs that several processes share."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import TEXTS, assert_same_state, flipped_byte, state_of, tiny_model, tiny_tokenizer

from easyedit_moe.errors import CacheError, CoverageWarning, EditingWarning
from easyedit_moe.hparams import GlobalHyperParams
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.statistics import checkpoint, moments
from easyedit_moe.statistics import gather as statistics
from easyedit_moe.statistics.__main__ import main
from easyedit_moe.statistics.moments import LayerMoments


class Run:
    """Statistics of a tiny model over 72 texts in 4 to 5 rounds, each of which is written down."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.model, self.tok = tiny_model(), tiny_tokenizer()
        self.corpus = folder / "corpus.txt"
        self.corpus.write_text("\n".join(TEXTS * 9), encoding="utf-8")
        monkeypatch.setattr(moments, "SHARD_CHARACTERS", 240)
        monkeypatch.setattr(moments, "ROUND_SHARDS", 4)
        monkeypatch.setattr(statistics, "CHECKPOINT_SECONDS", 0.0)

    def __call__(self, stats: str = "stats", stop_at: int | None = None, **changes: Any) -> dict[int, LayerMoments]:
        """``stop_at`` interrupts at that forward."""
        values = {
            "alg_name": "Global", "model_name": "tiny", "layers": [0, 2], "mom2_dataset": str(self.corpus),
            "stats_dir": str(self.folder / stats), "coverage_target": None,
        }  # fmt: skip
        hp = GlobalHyperParams.from_dict(values | changes)
        view = MoELayerView(self.model)
        self.forwards = 0

        def count(*_: Any) -> None:
            self.forwards += 1
            if self.forwards == stop_at:
                raise KeyboardInterrupt

        handle = self.model.model.layers[0].register_forward_pre_hook(count)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CoverageWarning)
                return statistics.layer_statistics(
                    view, self.tok, hp, hp.layers, model_fingerprint(view), progress=False
                )
        finally:
            handle.remove()

    def files(self, stats: str = "stats") -> list[Path]:
        return sorted((self.folder / stats).glob("tiny-*/*.safetensors"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, monkeypatch)


def same(found: dict[int, LayerMoments], wanted: dict[int, LayerMoments]) -> None:
    assert found.keys() == wanted.keys()
    for layer, value in found.items():
        assert value.num_tokens == wanted[layer].num_tokens
        for name in ("keys", "counts", "output"):
            assert torch.equal(getattr(value, name), getattr(wanted[layer], name))


@pytest.mark.parametrize("target", [None, 9.0])
def test_an_interrupted_run_goes_on(target: float | None, run: Run) -> None:
    whole = run("whole", coverage_target=target)
    total, before = run.forwards, state_of(run.model)
    with pytest.raises(KeyboardInterrupt):
        run(stop_at=total - 2, coverage_target=target)
    assert_same_state(before, state_of(run.model))
    assert [f.name.startswith("partial-") for f in run.files()] == [True]
    with pytest.raises(KeyboardInterrupt):
        run(stop_at=2, coverage_target=target)
    same(run(coverage_target=target), whole)
    assert run.forwards < total / 2 + 2
    assert [f.name[:5] for f in run.files()] == ["layer", "layer"], "sums of a finished run are removed"
    run(coverage_target=target)
    assert run.forwards == 0


def test_nothing_is_written_more_often_than_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    plain = checkpoint.write_safetensors
    monkeypatch.setattr(checkpoint, "write_safetensors", lambda path, *a: written.append(path) or plain(path, *a))
    run("often")
    assert len(written) == len(set(written)) > 2
    monkeypatch.setattr(statistics, "CHECKPOINT_SECONDS", 3600.0)
    written.clear()
    run()
    assert not written


def test_other_settings_do_not_take_up_a_run(run: Run) -> None:
    whole = run("whole", max_length=9)
    total = run.forwards
    with pytest.raises(KeyboardInterrupt):
        run(stop_at=total - 1)
    same(run(max_length=9), whole)
    assert run.forwards == total
    assert sum(f.name.startswith("partial-") for f in run.files()) == 1, "the other run may still be taken up"


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b"", lambda b: b[:-8], flipped_byte])
def test_a_damaged_file_does_not_count(damage: Callable[[bytes], bytes], run: Run) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(stop_at=12)
    (file,) = run.files()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(EditingWarning, match=r"partial-.* made anew"):
        found = run()
    same(found, run("whole"))


def test_a_file_of_another_run_is_refused(run: Run) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(stop_at=12)
    (file,) = run.files()
    with pytest.raises(KeyboardInterrupt):
        run("other", stop_at=12, layers=[0])
    file.write_bytes(run.files("other")[0].read_bytes())
    with pytest.raises(CacheError, match="sums of another run"):
        run()


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """The bundled model under torchrun with gloo, through the command that fills the cache."""
    hparams = {
        "alg_name": "Global", "model_name": "factworld", "dtype": "float32", "layers": [0, 1], "max_length": 24,
        "mom2_dataset": "factworld", "mom2_n_samples": 600, "coverage_target": None,
    }  # fmt: skip
    path = tmp_path / "hparams.yaml"
    path.write_text(yaml.safe_dump(hparams))
    folder = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    finished = subprocess.run(
        [*command, "easyedit_moe.statistics", str(path), "--stats-dir", str(tmp_path / "two")],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        main([str(path), "--stats-dir", str(tmp_path / "one")])
    one, two = (sorted((tmp_path / name).glob("factworld-*/*.safetensors")) for name in ("one", "two"))
    assert [f.name for f in one] == [f.name for f in two]
    assert len(one) == 2
    from safetensors.torch import load_file

    for a, b in zip(one, two, strict=True):
        alone, shared = load_file(a), load_file(b)
        assert torch.equal(alone["counts"], shared["counts"])
        assert int(alone["counts"].sum()) > 10000
        for name in ("keys", "output"):
            torch.testing.assert_close(shared[name], alone[name], atol=1e-6, rtol=1e-5)
