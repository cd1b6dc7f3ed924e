"""UltraEdit's normalisation: running statistics are those of all edits at once, whatever the batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.algebra.sequence_norm import EPS, Running, sequence_normalised
from easyedit_moe.errors import NumericalError

E, H, D = 5, 4, 3


def edits(count: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[RoutedKeys, Tensor]:
    random = torch.Generator().manual_seed(seed)
    expert = torch.stack([torch.randperm(E, generator=random)[:2] for _ in range(count)])
    gate = torch.rand(count, 2, generator=random, dtype=torch.float64)
    gate[0, 1] = 0.0  # padding
    key = 3 + torch.randn(count, 2, H, generator=random, dtype=torch.float64)
    residual = 1 + 5 * torch.randn(count, D, generator=random, dtype=torch.float64)
    return RoutedKeys(expert, gate.to(dtype), key.to(dtype)), residual.to(dtype)


def dense(keys: RoutedKeys, residual: Tensor, seen: RoutedKeys, seen_residual: Tensor, rate: float) -> Tensor:
    """The equation, one token after the other, with statistics of all that was seen."""
    mean, dev = seen_residual.mean(0), seen_residual.std(0, correction=0)
    unit = seen_residual.var(0, correction=0).mean().sqrt()
    out = []
    for t in range(keys.num_tokens):
        parts = []
        for slot in range(keys.expert.shape[1]):
            if keys.gate[t, slot] == 0:
                continue
            own = seen.key[(seen.expert == keys.expert[t, slot]) & (seen.gate != 0)]
            gates = seen.gate[(seen.expert == keys.expert[t, slot]) & (seen.gate != 0)]
            values, x = own * gates[:, None], keys.key[t, slot] * keys.gate[t, slot]
            normal = (x - values.mean(0)) / (values.std(0, correction=0) + EPS) if len(values) > 1 else x
            parts.append((normal**2).mean())
        out.append(rate * torch.stack(parts).mean() * unit * (residual[t] - mean) / (dev + EPS))
    return torch.stack(out)


@pytest.mark.parametrize("sizes", [(12,), (6, 6), (1, 4, 7)])
def test_every_batch_is_normalised_by_all_edits_so_far(sizes: tuple[int, ...]) -> None:
    running, aims = Running.empty(E, H), Running.empty(1, D)
    seen: list[tuple[RoutedKeys, Tensor]] = []
    for number, size in enumerate(sizes):
        keys, residual = edits(size, number)
        seen.append((keys, residual))
        found, running, aims = sequence_normalised(keys, residual, running, aims, 0.7)
        all_keys, all_residuals = RoutedKeys.cat([k for k, _ in seen]), torch.cat([r for _, r in seen])
        if len(all_residuals) > 1:
            expected = dense(keys, residual, all_keys, all_residuals, 0.7)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert float(running.count.sum()) == sum(2 * size - 1 for size in sizes)


def test_statistics_do_not_depend_on_the_batches() -> None:
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4 + 100
    group = torch.arange(40) % 3
    once = Running.empty(4, 3).with_values(values, group)
    parts = Running.empty(4, 3)
    for chunk in (slice(0, 1), slice(1, 17), slice(17, 40)):
        parts = parts.with_values(values[chunk], group[chunk])
    for a, b in zip(vars(once).values(), vars(parts).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(once.mean[1], values[group == 1].mean(0))
    torch.testing.assert_close(once.square[1] / once.count[1], values[group == 1].var(0, correction=0))
    assert once.count[3] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drifting_residuals_are_brought_back_to_the_scale_of_the_first(dtype: torch.dtype) -> None:
    """What the normalisation is for: residuals that grow from batch to batch do not make updates that grow as much."""
    running, aims, sizes = Running.empty(E, H), Running.empty(1, D), []
    for number in range(6):
        keys, residual = edits(20, 0, dtype)
        found, running, aims = sequence_normalised(keys, residual * 2**number, running, aims, 1.0)
        sizes.append(float(found.norm() / (residual.norm() * aims.scale())))
    assert max(sizes) < 3 * min(sizes)


def test_a_single_edit_is_not_normalised_away_and_nothing_infinite_enters() -> None:
    keys, residual = edits(1, 3)
    found, running, aims = sequence_normalised(keys, residual, Running.empty(E, H), Running.empty(1, D), 1.0)
    assert found.norm() > 0
    assert torch.nn.functional.cosine_similarity(found, residual).item() == pytest.approx(1)
    with pytest.raises(NumericalError, match="running statistics"):
        sequence_normalised(keys, residual * float("inf"), running, aims, 1.0)
