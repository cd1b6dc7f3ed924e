from __future__ import annotations

import os
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
    """EasyEdit, from the path or the checkout that EASYEDIT_HOME names; a test is skipped where there is none."""
    from easyedit_moe import host

    if not host.is_available():
        pytest.skip("There is no EasyEdit: set EASYEDIT_HOME to a checkout of it")
    return host.load()
