"""Low-rank factors against dense singular value decompositions in float64."""

from __future__ import annotations

import pytest
import torch

from easyedit_moe.algebra.low_rank import low_rank, rounded_difference
from easyedit_moe.errors import NumericalError

SHAPES = [(7, 5, 3), (5, 7, 3), (6, 6, 6), (4, 9, 12), (9, 4, 12), (1, 3, 1), (32, 24, 1)]


def factors(d: int, h: int, r: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, r, generator=draw, dtype=torch.float64).to(dtype) for n in (d, h))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_exact_product_of_the_smallest_rank(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    left, right = factors(*shape, dtype=dtype)
    dense = left.double() @ right.double().T
    b, a = low_rank(left, right)
    assert b.dtype == a.dtype == torch.float64
    assert b.shape[1] == len(a) == torch.linalg.matrix_rank(dense) == min(shape)
    torch.testing.assert_close(b @ a, dense, rtol=1e-12, atol=1e-12)
    assert float(b.norm(dim=0).pow(4).sum().sqrt()) == pytest.approx(float(dense.norm()), rel=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 4, 50])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_nearest_product_of_a_lower_rank(shape: tuple[int, int, int], rank: int) -> None:
    left, right = factors(*shape)
    dense = left @ right.T
    values = torch.linalg.svdvals(dense)
    b, a = low_rank(left, right, rank)
    assert len(a) == min(rank, *shape)
    expected = float(values[rank:].square().sum().sqrt())
    assert float((dense - b @ a).norm()) == pytest.approx(expected, abs=1e-12)
    assert rounded_difference(*low_rank(left, right), b, a) == pytest.approx(expected, abs=1e-12)
    # The singular values are shared: neither factor is much larger than the other.
    torch.testing.assert_close(b.norm(dim=0), values[: len(a)].sqrt(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(a.norm(dim=1), values[: len(a)].sqrt(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 3, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_of_rank_and_rounding_is_that_of_the_dense_products(
    shape: tuple[int, int, int], rank: int, dtype: torch.dtype
) -> None:
    exact_b, exact_a = low_rank(*factors(*shape))
    b, a = exact_b[:, :rank].to(dtype), exact_a[:rank].to(dtype)
    dense = float((exact_b @ exact_a - b.double() @ a.double()).norm())
    assert rounded_difference(exact_b, exact_a, b, a) == pytest.approx(dense, rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_columns_that_say_the_same_twice_or_cancel(scale: float) -> None:
    left, right = factors(8, 6, 2)
    twice = torch.cat([left, left], dim=1) * scale
    b, a = low_rank(twice, torch.cat([right, right], dim=1))
    assert len(a) == 2
    torch.testing.assert_close(b @ a, 2 * scale * left @ right.T, rtol=1e-12, atol=1e-12 * scale)
    b, a = low_rank(twice, torch.cat([right, -right], dim=1))
    assert (b.shape, a.shape) == ((8, 0), (0, 6))
    assert rounded_difference(b, a, b, a) == 0


def test_nothing_and_what_is_not_finite() -> None:
    empty, other = torch.zeros(4, 0), torch.zeros(3, 0)
    assert [tuple(one.shape) for one in low_rank(empty, other)] == [(4, 0), (0, 3)]
    assert rounded_difference(*low_rank(empty, other), *low_rank(empty, other)) == 0
    assert len(low_rank(torch.zeros(4, 2), torch.ones(3, 2))[1]) == 0
    for value in (float("nan"), float("inf")):
        with pytest.raises(NumericalError, match="NaN or infinity"):
            low_rank(torch.full((4, 2), value), torch.ones(3, 2))
