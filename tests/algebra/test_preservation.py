"""LyapLock's queue: the loss is that of a dense model of preserved keys, and the queue bounds its mean."""

from __future__ import annotations

import pytest
import torch

from easyedit_moe.algebra.preservation import FIRST, next_queue, preservation_loss
from easyedit_moe.errors import HyperParamsError, NumericalError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d", "h"), [(5, 7), (7, 5), (4, 4)])
def test_the_loss_is_the_mean_squared_change_of_what_experts_return(dtype: torch.dtype, d: int, h: int) -> None:
    random = torch.Generator().manual_seed(d * h)
    counts = [30, 0, 50]
    keys = [torch.randn(n, h, generator=random, dtype=torch.float64) for n in counts]
    drift = torch.randn(3, d, h, generator=random, dtype=torch.float64).to(dtype)
    moments = torch.stack([k.T @ k / max(len(k), 1) for k in keys])
    moved = torch.cat([k @ one.double().T for k, one in zip(keys, drift, strict=True)])
    expected = float((moved**2).sum(1).mean())
    assert preservation_loss(drift, moments, torch.tensor(counts)) == pytest.approx(expected, rel=1e-6)


def test_the_queue_grows_above_the_bound_and_comes_back_below_it() -> None:
    queue = FIRST
    grown = [queue := next_queue(queue, 0.3, 0.1) for _ in range(3)]
    assert grown == pytest.approx([3, 5, 7])
    shrunk = [queue := next_queue(queue, 0.0, 0.1) for _ in range(8)]
    assert shrunk == pytest.approx([6, 5, 4, 3, 2, 1, 1, 1])


@pytest.mark.parametrize("bound", [0.02, 0.2])
def test_the_long_run_mean_of_the_loss_stays_below_the_bound(bound: float) -> None:
    """A batch wants to change preserved outputs by 1; with weight Z on preservation 1 / (1 + Z)^2 of it is left."""
    queue, losses = FIRST, []
    for _ in range(4000):
        losses.append(1 / (1 + queue) ** 2)
        queue = next_queue(queue, losses[-1], bound)
    mean = sum(losses) / len(losses)
    assert mean <= bound + bound * queue / len(losses) + 1e-9, "the queue's own bound on the mean"
    assert mean < 1.01 * bound
    assert losses[0] == 0.25


def test_no_bound_no_tokens_no_numbers() -> None:
    one = torch.ones(1, 2, 2)
    with pytest.raises(HyperParamsError, match="greater than 0"):
        next_queue(1.0, 0.1, 0.0)
    with pytest.raises(NumericalError, match="larger corpus"):
        preservation_loss(one, one, torch.tensor([0]))
    with pytest.raises(NumericalError, match="infinite"):
        preservation_loss(one * float("inf"), one, torch.tensor([3]))
