"""Files can't run code, and names can't leave their folder."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edited_folders import saved
from tiny import tiny_model

from easyedit_moe.errors import DataError, EditingError, EditingWarning
from easyedit_moe.host.dense_statistics import (
    holds_projectors,
    holds_statistics,
    write_layer_statistics,
    write_projectors,
)
from easyedit_moe.moe.loading import load_model
from easyedit_moe.patches.files import load_patch
from easyedit_moe.statistics.cache import statistics_folder


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


# ---------------------------------------------------------------- pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_model_folder_with_an_unsafe_pickle(name: str, tmp_path: Path) -> None:
    folder, mark = saved(tmp_path / "model", tiny_model()), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload(mark)}, folder / name)
    with pytest.raises(DataError, match=r"Only weights in safetensors.*may run code|SafetensorError"):
        load_model(str(folder), "float32")
    assert not mark.exists()


def test_a_plain_pickle_of_weights_is_refused_too(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", tiny_model())
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="safetensors"):
        load_model(str(folder), "float32")


def test_patches_are_not_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for write in (lambda p: torch.save(Payload(mark), p), lambda p: p.write_bytes(pickle.dumps(Payload(mark)))):
        write(tmp_path / "patch.safetensors")
        with pytest.raises(EditingError):
            load_patch(tmp_path / "patch.safetensors")
    assert not mark.exists()


def test_statistics_of_easyedits_formats_are_read_without_running_anything(tmp_path: Path) -> None:
    mark, path, projectors = tmp_path / "ran", tmp_path / "s.npz", tmp_path / "p.pt"
    moment = torch.diag(torch.tensor([1.0, 1e-9, 2.0], dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not holds_statistics(path)
        assert not holds_projectors(projectors, 1)
        write_layer_statistics(path, moment, 4, 2)
        write_projectors(projectors, [(moment, 1)], 1e-3)
        assert holds_statistics(path)
        assert holds_projectors(projectors, 1)
    payload = np.empty((), dtype=object)
    payload[()] = Payload(mark)
    bad_statistics: list[Callable[[], Any]] = [
        lambda: np.savez(path, **{"mom2.mom2": payload, "mom2.count": 1}),
        lambda: np.savez(path, **{"mom2.mom2": np.full((3, 3), np.nan, np.float32), "mom2.count": 1}),
        lambda: np.savez(path, **{"mom2.mom2": np.zeros((3, 2), np.float32), "mom2.count": 1}),
        lambda: np.savez(path, other=1),
        lambda: path.write_bytes(pickle.dumps(Payload(mark))),
        lambda: path.write_bytes(b""),
    ]
    for write in bad_statistics:
        write()
        with pytest.warns(EditingWarning, match="made anew"):
            assert not holds_statistics(path)
    for value in (Payload(mark), torch.zeros(2, 3, 3), torch.zeros(1, 3, 2), torch.full((1, 2, 2), torch.inf), [1]):
        torch.save(value, projectors)
        with pytest.warns(EditingWarning, match="made anew"):
            assert not holds_projectors(projectors, 1)
    assert not mark.exists()


# ---------------------------------------------------------------- code that comes with a model

LOADERS = """
import sys
from easyedit_moe.adapters.saving import load_with_adapter
from easyedit_moe.checkpoints.saving import check_saved, save_edited
from easyedit_moe.errors import EditingError
from easyedit_moe.moe.loading import checkpoint_dtype, empty_model, load_model, load_tokenizer
from easyedit_moe import factworld
model, tok = load_model("factworld")
folder = sys.argv[1]
for load in (load_model, empty_model, checkpoint_dtype, load_tokenizer, check_saved,
             lambda folder: save_edited(model, tok, folder + "-out", folder)):
    try:
        load(folder)
    except EditingError as error:
        print(type(error).__name__, str(error)[:60].replace(chr(10), " "))
    else:
        print("loaded")
"""


@pytest.mark.parametrize("where", ["config", "tokenizer"])
def test_yes_on_standard_input_runs_nothing(where: str, tmp_path: Path) -> None:
    folder, mark = saved(tmp_path / "model", tiny_model()), tmp_path / "ran"
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Own:\n    pass\n")
    name, entries = {
        "config": ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}),
        "tokenizer": (
            "tokenizer_config.json",
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
        ),
    }[where]  # fmt: skip
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **entries}))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADERS, str(folder)], input="y\n" * 50, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not mark.exists()
    assert "[y/N]" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6, done.stdout
    if where == "config":
        assert all(re.match(r"(DataError|CheckpointError) ", line) for line in lines), lines
        assert "Only weights" not in done.stdout


def test_every_call_of_transformers_says_whether_code_is_trusted() -> None:
    package = Path(__file__).parents[1] / "easyedit_moe"
    for path in package.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for call in re.findall(r"(?:Auto\w+|auto)\.from_(?:pretrained|config)\((.*)", source):
            assert "trust_remote_code" in call or "**options" in call or "{" in call, (path, call)


# ---------------------------------------------------------------- names that lead elsewhere


@pytest.mark.parametrize(
    "name",
    [
        "../../etc",
        "/etc/passwd",
        "..",
        ".",
        "../",
        "a/../../b",
        "~root",
        "C:\\x\\..",
        "..\\..\\x",
        "a\0b",
        "",
        "/",
        "....//x",
    ],
)  # fmt: skip
def test_statistics_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    found = statistics_folder(tmp_path / "stats", name, "ab" * 32)
    assert found.parent == tmp_path / "stats"
    assert found.resolve().parent == (tmp_path / "stats").resolve()
    assert found.name.endswith("-" + "ab" * 8)
