from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a hub, and a missing name then fails at once

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)  # on tensors this small, threads only wait for one another


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
