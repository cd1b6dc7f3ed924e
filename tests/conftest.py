from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a hub, and a missing name then fails at once

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)  # on tensors this small, threads only wait for one another


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_editing_warnings() -> Iterator[None]:
    """Edits of tiny models reach little, and say so."""
    from easyedit_moe.errors import EditingWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)
        yield


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs in a folder of its own: EasyEdit writes ./logs."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, in which statistics are shared by all tests of a module."""
    from tiny import TEXTS

    folder = tmp_path_factory.mktemp("data")
    (folder / "corpus.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def host() -> ModuleType:
    """EasyEdit, from the path or the checkout that EASYEDIT_HOME names; a test is skipped where there is none."""
    from easyedit_moe import host

    if not host.is_available():
        pytest.skip("There is no EasyEdit: set EASYEDIT_HOME to a checkout of it")
    return host.load()
