"""Updates that keep a Tucker core: what they expand to, a few experts at a time, against dense float64 references."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from easyedit_moe.algebra.core import FactoredCore
from easyedit_moe.algebra.core_update import CoreUpdate, TuckerFactors, joined_cores, place_core
from easyedit_moe.algebra.metric import IdentityMetric, Metric
from easyedit_moe.algebra.nullspace import null_space
from easyedit_moe.algebra.routed_keys import FactoredUpdate, RoutedKeys

E, D, H, RE, RO, RI = 7, 13, 11, 4, 6, 5
DTYPES = [torch.float32, torch.float64]


def metric_of(name: str) -> Metric:
    if name == "identity":
        return IdentityMetric()
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(E, H, 3 * H, generator=draw, dtype=torch.float64) * torch.logspace(0, -3, H)[:, None]
    space = null_space(x @ x.mT, torch.full((E,), 33), 0.05, relative=True)
    assert {p.complement for p in space.projectors} == {True, False} or len(set(space.ranks)) > 1
    return space


def factors_of(name: str = "null space", dtype: torch.dtype = torch.float32, seed: int = 0) -> TuckerFactors:
    draw = torch.Generator().manual_seed(seed)

    def factor(size: int, rank: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, rank, generator=draw, dtype=torch.float64)).Q.to(dtype)

    return TuckerFactors(factor(E, RE), factor(H, RI), factor(D, RO), metric_of(name))


def core_of(tokens: int, factors: TuckerFactors, seed: int = 0, slots: int = 2) -> FactoredCore:
    draw = torch.Generator().manual_seed(seed)
    left = torch.randn(RO, tokens, generator=draw, dtype=torch.float64)
    expert = torch.stack([torch.randperm(E, generator=draw)[:slots] for _ in range(tokens)])
    return FactoredCore(
        left, expert, torch.randn(tokens, slots, RI, generator=draw, dtype=torch.float64), factors.expert
    )


def by_definition(core: FactoredCore | Tensor, factors: TuckerFactors) -> Tensor:
    """``Delta_j = U_out (sum_a U_e[j,a] G_a) U_in^T M_j`` in float64, term by term."""
    if isinstance(core, Tensor):
        dense = core.double()
    else:
        source, dense = core.u_expert.double(), torch.zeros(RE, RO, RI, dtype=torch.float64)
        for t in range(core.left.shape[1]):
            for k in range(core.expert.shape[1]):
                outer = core.left[:, t].double()[:, None] * core.inner[t, k].double()[None]
                dense += source[core.expert[t, k]][:, None, None] * outer
    found = []
    for expert in range(E):
        mixed = torch.einsum("a,aoi->oi", factors.expert[expert].double(), dense)
        projected = factors.metric.apply(expert, torch.eye(H, dtype=torch.float64))
        found.append(factors.outer.double() @ mixed @ factors.inner.double().T @ projected)
    return torch.stack(found)


@pytest.mark.parametrize("tokens", [1, 3, RO, 9], ids=str)
@pytest.mark.parametrize("name", ["identity", "null space"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_what_the_core_means(dtype: torch.dtype, name: str, tokens: int) -> None:
    factors = factors_of(name, dtype)
    core = core_of(tokens, factors)
    update = place_core(core, factors)
    assert isinstance(update, CoreUpdate)
    assert (update.rank, update.experts, update.d_model, update.d_hidden) == (min(tokens, RO), tuple(range(E)), D, H)
    wanted, limit = by_definition(core, factors), {torch.float32: 2e-6, torch.float64: 1e-13}[dtype]
    assert update.left.dtype == dtype
    torch.testing.assert_close(update.dense(E).double(), wanted, rtol=limit, atol=10 * limit)
    torch.testing.assert_close(update.scale(0.5).dense(E).double(), wanted / 2, rtol=limit, atol=10 * limit)


@pytest.mark.parametrize("form", ["experts", "directions", "dense"])
def test_all_forms_of_a_core_mean_the_same(form: str) -> None:
    factors = factors_of(dtype=torch.float64)
    core = core_of(3, factors)
    other = {"experts": core, "directions": core.by_directions(), "dense": core.dense()}[form]
    torch.testing.assert_close(CoreUpdate(other, factors).dense(E), by_definition(core, factors))


def test_the_smallest_form_is_taken() -> None:
    factors = factors_of()
    many = core_of(2, factors, slots=6).smallest()
    assert isinstance(many, FactoredCore)
    assert many.inner.shape == (2, RE, RI)
    assert core_of(2, factors).smallest().inner.shape == (2, 2, RI)
    assert core_of(30, factors).smallest().shape == (RE, RO, RI)


@pytest.mark.parametrize("tokens", [2, 9])
def test_an_experts_bits_do_not_depend_on_the_others_that_are_asked_for(tokens: int) -> None:
    update = CoreUpdate(core_of(tokens, factors := factors_of()), factors).to(dtype=torch.float32)
    whole = update.expanded()
    for start, stop in ((0, 1), (2, 5), (3, 7)):
        for place, right in enumerate(update.rights(start, stop), start):
            assert torch.equal(right, whole.right[place])
    assert torch.equal(update.left, whole.left)


@pytest.mark.parametrize("tokens", [3, 9])
@pytest.mark.parametrize("name", ["identity", "null space"])
def test_what_it_does_to_tokens(name: str, tokens: int) -> None:
    factors = factors_of(name, torch.float64)
    update = CoreUpdate(core_of(tokens, factors), factors)
    draw = torch.Generator().manual_seed(5)
    expert = torch.stack([torch.randperm(E, generator=draw)[:3] for _ in range(5)])
    keys = RoutedKeys(expert, torch.rand(5, 3, generator=draw), torch.randn(5, 3, H, generator=draw))
    torch.testing.assert_close(update.apply(keys), update.expanded().apply(keys), rtol=1e-10, atol=1e-12)


def test_a_core_of_another_layers_gauge() -> None:
    own, other = factors_of(dtype=torch.float64), factors_of(dtype=torch.float64, seed=3)
    core = core_of(3, other)
    torch.testing.assert_close(place_core(core, own).dense(E), by_definition(core, own))


def test_with_all_expert_directions_only_own_tokens_count() -> None:
    full = replace(factors_of(), expert=torch.linalg.qr(torch.randn(E, E, dtype=torch.float64)).Q.float())
    core = replace(core_of(2, full), u_expert=full.expert)
    update = place_core(core, full)
    assert isinstance(update, FactoredUpdate)
    assert set(update.experts) == set(core.expert.flatten().tolist())
    assert sum(len(columns) for columns in update.columns) == 4


@pytest.mark.parametrize("sizes", [(1, 2), (3, 2, 20), (40, 1)], ids=str)
def test_the_sum_of_cores(sizes: tuple[int, ...]) -> None:
    factors = factors_of(dtype=torch.float64)
    cores = [core_of(n, factors, seed, slots=2 + seed % 2) for seed, n in enumerate(sizes)]
    joined = joined_cores([CoreUpdate(core.smallest(), factors) for core in cores])
    wanted = torch.stack([by_definition(core, factors) for core in cores]).sum(0)
    torch.testing.assert_close(joined.dense(E), wanted)
    numbers = joined.core if isinstance(joined.core, Tensor) else joined.core.inner
    assert numbers.numel() <= RE * RO * RI


def test_what_is_not_finite_is_seen() -> None:
    factors = factors_of()
    core = core_of(2, factors)
    assert CoreUpdate(core, factors).is_finite()
    for broken in (replace(core, left=core.left / 0), replace(core, inner=core.inner * torch.nan)):
        assert not CoreUpdate(broken, factors).is_finite()
