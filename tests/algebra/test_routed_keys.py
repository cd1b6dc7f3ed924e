"""Routed keys and factored updates against dense tensors built with plain loops and einsum."""

from __future__ import annotations

import pytest
import torch
from reference import loop_psi
from torch import Tensor

from benchmarks.syncs import counted_syncs
from easyedit_moe.algebra.routed_keys import FactoredUpdate, RoutedKeys

# (T, E, K, h): experts never hit; an expert hit by several tokens; T_j > h; every expert hit by every token; one token.
SHAPES = [(3, 9, 2, 5), (6, 4, 2, 5), (12, 3, 2, 4), (4, 3, 3, 6), (1, 4, 1, 3)]


def routed(shape: tuple[int, int, int, int], seed: int = 0, dtype: torch.dtype = torch.float64) -> RoutedKeys:
    tokens, experts, width, hidden = shape
    g = torch.Generator().manual_seed(seed)
    expert = torch.stack([torch.randperm(experts, generator=g)[:width] for _ in range(tokens)])
    gate = torch.rand(tokens, width, generator=g, dtype=torch.float64) + 0.1
    key = torch.randn(tokens, width, hidden, generator=g, dtype=torch.float64)
    return RoutedKeys(expert, gate.to(dtype), key.to(dtype))


def padded(keys: RoutedKeys, extra: int) -> RoutedKeys:
    """The same routing with ``extra`` slots that name expert 0 with a zero gate, as the ModuleList reader pads."""
    pad = torch.nn.functional.pad
    return RoutedKeys(pad(keys.expert, (0, extra)), pad(keys.gate, (0, extra)), pad(keys.key, (0, 0, 0, extra)))


def random_update(experts: tuple[int, ...], d: int, h: int, seed: int = 0) -> FactoredUpdate:
    """Columns of different number per expert, shared between experts and out of order."""
    g = torch.Generator().manual_seed(seed)
    left = torch.randn(d, 6, generator=g, dtype=torch.float64)
    columns = tuple(torch.randperm(6, generator=g)[: 1 + i % 4] for i in range(len(experts)))
    right = tuple(torch.randn(h, len(c), generator=g, dtype=torch.float64) for c in columns)
    return FactoredUpdate(left, experts, columns, right)


def loop_dense(update: FactoredUpdate, experts: int, h: int) -> Tensor:
    out = torch.zeros(experts, update.left.shape[0], h, dtype=torch.float64)
    for j, columns, right in zip(update.experts, update.columns, update.right, strict=True):
        for r, column in enumerate(columns.tolist()):
            out[j] += torch.outer(update.left[:, column], right[:, r])
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dense_is_the_design_vector_of_every_token(shape: tuple, dtype: torch.dtype) -> None:
    keys = routed(shape, seed=1, dtype=dtype)
    dense = keys.dense(shape[1])
    assert dense.dtype == torch.float64
    torch.testing.assert_close(dense, loop_psi(keys, shape[1]).flatten(1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_design_lists_the_hit_experts_with_their_tokens_and_gated_keys(shape: tuple, seed: int) -> None:
    keys = routed(shape, seed)
    psi = loop_psi(keys, shape[1])
    blocks = keys.design()
    assert [b.expert for b in blocks] == sorted({j for row in keys.expert.tolist() for j in row})
    for block in blocks:
        tokens = [t for t, row in enumerate(keys.expert.tolist()) if block.expert in row]
        assert block.rows.tolist() == tokens
        assert block.z.shape == (shape[3], len(tokens))
        torch.testing.assert_close(block.z, psi[tokens, block.expert].T, rtol=1e-14, atol=0)
    assert sum(len(b.rows) for b in blocks) == shape[0] * shape[2]


def test_sizes_come_from_the_tensors() -> None:
    keys = routed((5, 7, 2, 3))
    assert (keys.num_tokens, keys.d_hidden) == (5, 3)


def test_design_computes_in_the_dtype_asked_for() -> None:
    keys = routed((4, 3, 2, 5), dtype=torch.bfloat16)
    assert all(b.z.dtype == torch.float32 for b in keys.design(torch.float32))
    # The product is formed after the cast: in bfloat16 it would be rounded to 8 bits.
    wanted = keys.gate[0, 0].double() * keys.key[0, 0].double()
    block = next(b for b in keys.design() if b.expert == int(keys.expert[0, 0]))
    assert torch.equal(block.z[:, block.rows.tolist().index(0)], wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("extra", [1, 2])
def test_padded_slots_change_nothing(shape: tuple, extra: int) -> None:
    keys = routed(shape, seed=3)
    plain, wide = keys.design(), padded(keys, extra).design()
    assert [b.expert for b in plain] == [b.expert for b in wide]
    for a, b in zip(plain, wide, strict=True):
        assert torch.equal(a.rows, b.rows)
        assert torch.equal(a.z, b.z)
    assert torch.equal(padded(keys, extra).dense(shape[1]), keys.dense(shape[1]))


def test_design_of_no_tokens_is_empty() -> None:
    keys = RoutedKeys(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), torch.zeros(0, 2, 3))
    assert keys.design() == []
    assert keys.dense(4).shape == (0, 12)


def test_cat_stacks_rows_in_order() -> None:
    a, b = routed((3, 5, 2, 4), seed=0), routed((2, 5, 2, 4), seed=1)
    both = RoutedKeys.cat([a, b])
    assert both.num_tokens == 5
    assert torch.equal(both.dense(5), torch.cat([a.dense(5), b.dense(5)]))
    assert not torch.equal(both.dense(5), RoutedKeys.cat([b, a]).dense(5))


def test_cat_pads_a_smaller_k() -> None:
    a, b = routed((3, 5, 1, 4), seed=0), routed((2, 5, 3, 4), seed=1)
    both = RoutedKeys.cat([a, b])
    assert both.expert.shape == (5, 3)
    assert torch.equal(both.dense(5), torch.cat([a.dense(5), b.dense(5)]))


def test_keys_move_with_all_their_tensors() -> None:
    moved = routed((3, 5, 2, 4)).to("meta")
    assert {moved.expert.device.type, moved.gate.device.type, moved.key.device.type} == {"meta"}


@pytest.mark.parametrize("experts", [(), (2,), (0, 1, 2, 3), (1, 3, 6)])
def test_update_dense_and_deltas_agree_with_outer_products(experts: tuple[int, ...]) -> None:
    update = random_update(experts, d=3, h=5)
    if experts:
        torch.testing.assert_close(update.dense(7), loop_dense(update, 7, 5), rtol=1e-13, atol=1e-13)
    seen = dict(update.deltas())
    assert tuple(seen) == experts
    for j, delta in seen.items():
        torch.testing.assert_close(delta, loop_dense(update, 7, 5)[j], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("experts", [(0, 1, 2), (1,), (0, 2)])
def test_apply_is_the_gated_sum_over_experts(shape: tuple, experts: tuple[int, ...]) -> None:
    keys = routed(shape, seed=5)
    update = random_update(experts, d=3, h=shape[3])
    wanted = torch.einsum("tjh,jdh->td", loop_psi(keys, shape[1]), loop_dense(update, shape[1], shape[3]))
    moved = update.apply(keys)
    torch.testing.assert_close(moved, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(update.apply(padded(keys, 2)), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [0.25, -2.0, 0.0])
def test_scale_multiplies_the_dense_update(factor: float) -> None:
    update = random_update((0, 2, 3), d=3, h=4)
    before = update.dense(4)
    torch.testing.assert_close(update.scale(factor).dense(4), factor * before, rtol=1e-14, atol=0)
    assert torch.equal(update.dense(4), before)


def test_update_changes_dtype_and_device_of_every_factor() -> None:
    update = random_update((0, 2), d=3, h=4)
    single = update.to(dtype=torch.float32)
    assert single.left.dtype == torch.float32
    assert all(r.dtype == torch.float32 for r in single.right)
    assert all(c.dtype == torch.int64 for c in single.columns)
    torch.testing.assert_close(single.dense(3).double(), update.dense(3), rtol=1e-5, atol=1e-6)
    moved = update.to("meta")
    assert {t.device.type for t in (moved.left, *moved.columns, *moved.right)} == {"meta"}
    assert moved.left.dtype == torch.float64


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_is_finite_looks_at_every_factor(bad: float) -> None:
    update = random_update((0, 2), d=3, h=4)
    assert update.is_finite()
    left = update.left.clone()
    left[1, 2] = bad
    assert not FactoredUpdate(left, update.experts, update.columns, update.right).is_finite()
    last = update.right[1].clone()
    last[0, 0] = bad
    assert not FactoredUpdate(update.left, update.experts, update.columns, (update.right[0], last)).is_finite()


@pytest.mark.parametrize("place", [None, 0, 3, "left"])
def test_a_layers_update_is_checked_at_once(place: int | str | None) -> None:
    draw = torch.Generator().manual_seed(0)
    right = [torch.randn(4, 2, generator=draw) for _ in range(4)]
    left = torch.randn(5, 2, generator=draw)
    if place is not None:
        (left if place == "left" else right[int(place)])[1, 1] = float("inf")
    update = FactoredUpdate(left, (0, 1, 2, 5), (torch.arange(2),) * 4, tuple(right))
    with counted_syncs("cpu") as found:
        assert update.is_finite() == (place is None)
    assert sum(found.values()) == 1
