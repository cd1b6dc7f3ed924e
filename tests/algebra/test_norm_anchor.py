"""Norm-anchored scaling: the longest step within the bound, as a dense search finds it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from easyedit_moe.algebra.norm_anchor import anchored
from easyedit_moe.algebra.routed_keys import FactoredUpdate
from easyedit_moe.errors import HyperParamsError, NumericalError


def case(seed: int, size: float, dtype: torch.dtype, d: int, h: int) -> tuple[FactoredUpdate, dict[int, Tensor]]:
    """An update of experts 0, 2 and 3 of four, and weights that the last two do not start from."""
    random = torch.Generator().manual_seed(seed)
    left = size * torch.randn(d, 5, generator=random, dtype=torch.float64).to(dtype)
    columns = (torch.tensor([0, 1]), torch.tensor([1, 2, 3, 4]), torch.tensor([4]))
    right = tuple(torch.randn(h, len(c), generator=random, dtype=torch.float64).to(dtype) for c in columns)
    weights = {j: torch.randn(d, h, generator=random).to(torch.bfloat16) for j in (0, 2, 3)}
    return FactoredUpdate(left, (0, 2, 3), columns, right), weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d", "h"), [(6, 9), (9, 6), (4, 4)])
@pytest.mark.parametrize("size", [1e-3, 0.3, 20.0])
def test_it_is_the_longest_step_within_the_bound(dtype: torch.dtype, d: int, h: int, size: float) -> None:
    update, weights = case(d + h, size, dtype, d, h)
    # Expert 3 has grown beyond the bound already.
    norms = torch.tensor([float(weights[0].double().norm()), 1.0, float(weights[2].double().norm()) / 1.2, 0.5])
    found, scales = anchored(update, weights, norms, 1.5)
    for (expert, new), (_, old), scale in zip(found.deltas(), update.deltas(), scales.tolist(), strict=True):
        w, old, new = weights[expert].double(), old.double(), new.double()
        bound = max(1.5 * float(norms[expert]), float(w.norm()))
        torch.testing.assert_close(new, scale * old, rtol=1e-5, atol=1e-7)
        assert float((w + scale * old).norm()) <= bound * (1 + 1e-6)
        steps = torch.linspace(0, 1, 20001, dtype=torch.float64)
        lengths = torch.stack([(w + step * old).norm() for step in steps[:: 1 if scale < 1 else 100]])
        fits = steps[:: 1 if scale < 1 else 100][lengths <= bound * (1 + 1e-12)]
        assert float(fits.max()) == pytest.approx(scale, abs=1e-4)
    assert (scales == 1).all() if size == 1e-3 and float(scales[2]) == 1 else True


def test_small_updates_stay_bit_equal_and_large_ones_are_cut() -> None:
    update, weights = case(0, 1e-3, torch.float64, 6, 9)
    norms = torch.tensor(
        [float(weights[j].double().norm()) if j != 1 else 1.0 for j in (0, 1, 2, 3) if j in weights or j == 1]
    )
    norms = torch.stack([weights.get(j, torch.ones(1)).double().norm() for j in range(4)])
    same, scales = anchored(update, weights, norms, 1.1)
    assert scales.tolist() == [1.0, 1.0, 1.0]
    assert all(a is b for a, b in zip(same.right, update.right, strict=True))
    _, scales = anchored(update.scale(1e5), weights, norms, 1.1)
    assert (scales < 0.1).all()


def test_no_anchor_below_the_norm_itself_and_nothing_that_is_not_finite() -> None:
    update, weights = case(1, 1.0, torch.float64, 4, 4)
    with pytest.raises(HyperParamsError, match="at least 1"):
        anchored(update, weights, torch.ones(4), 0.9)
    with pytest.raises(NumericalError, match="anchored"):
        anchored(update.scale(float("nan")), weights, torch.ones(4), 1.5)
