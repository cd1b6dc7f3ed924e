"""SPHERE: principal directions of experts' weights, and updates without them."""

from __future__ import annotations

import pytest
import torch

from easyedit_moe.algebra.hypersphere import principal_directions, projected
from easyedit_moe.algebra.routed_keys import FactoredUpdate
from easyedit_moe.errors import HyperParamsError, NumericalError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("d", "h"), [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize("energy", [0.3, 0.8, 1.0])
def test_directions_are_the_leading_right_singular_vectors(dtype: torch.dtype, d: int, h: int, energy: float) -> None:
    weight = torch.randn(d, h, generator=torch.Generator().manual_seed(d), dtype=torch.float64).to(dtype)
    found = principal_directions(weight, energy)
    _, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    share = (values**2).cumsum(0) / (values**2).sum()
    count = int((share < energy * (1 - 1e-9)).sum()) + 1
    assert found.shape == (h, count)
    torch.testing.assert_close(found @ found.T, right[:count].T @ right[:count], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_an_update_loses_these_directions_and_nothing_else(strength: float) -> None:
    random = torch.Generator().manual_seed(1)
    weights = torch.randn(3, 6, 8, generator=random, dtype=torch.float64)
    directions = [principal_directions(one, 0.6) for one in weights]
    left = torch.randn(6, 4, generator=random, dtype=torch.float64)
    columns = (torch.tensor([0, 1, 2]), torch.tensor([3]))
    update = FactoredUpdate(
        left, (0, 2), columns, tuple(torch.randn(8, len(c), generator=random).double() for c in columns)
    )
    found, before = projected(update, directions, strength).dense(3), update.dense(3)
    for expert in (0, 2):
        p = torch.eye(8, dtype=torch.float64) - strength * directions[expert] @ directions[expert].T
        torch.testing.assert_close(found[expert], before[expert] @ p)
        assert before[expert].norm() > 0
    if strength == 1:
        for expert in (0, 2):
            assert (found[expert] @ directions[expert]).abs().max() < 1e-12
            # W W^T changes by the update's own square alone, but for W's trailing directions.
            lead = weights[expert] @ directions[expert] @ directions[expert].T
            assert (lead @ found[expert].T).abs().max() < 1e-12


def test_shares_out_of_range_and_weights_that_are_not_finite() -> None:
    weight = torch.ones(3, 3)
    for energy in (0.0, 1.5):
        with pytest.raises(HyperParamsError, match="sphere_energy"):
            principal_directions(weight, energy)
    with pytest.raises(NumericalError, match="principal directions"):
        principal_directions(weight * float("nan"), 0.5)
    empty = FactoredUpdate(torch.zeros(3, 0), (), (), ())
    with pytest.raises(HyperParamsError, match="sphere_strength"):
        projected(empty, [], 0.0)
