from __future__ import annotations

import importlib
import os
import sys
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


@pytest.fixture(scope="session")
def host() -> ModuleType:
    """EasyEdit, from the path or from the checkout that EASYEDIT_HOME names; a test is skipped where there is none."""
    if home := os.environ.get("EASYEDIT_HOME"):
        sys.path.insert(0, home)
    try:
        return importlib.import_module("easyeditor")
    except ImportError as error:
        pytest.skip(f"EasyEdit can't be imported ({error}); set EASYEDIT_HOME to a checkout and install what it needs")
