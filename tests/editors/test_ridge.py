"""A ridge in units of the keys: what its unit is, that nothing but the model's scale is taken out, and its settings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import loop_psi
from solving_editors import TOK, captured, edit, hparams, plain_ridge, stacked
from tiny import facts, requests, tiny_model

from easyedit_moe.algebra.bcd import expert_orders, solve_bcd
from easyedit_moe.algebra.core import core_energy, core_features, solve_mote
from easyedit_moe.algebra.core_update import expand_core
from easyedit_moe.algebra.exact import solve_exact
from easyedit_moe.algebra.metric import IdentityMetric, covariance_metric, mean_energy
from easyedit_moe.algebra.nullspace import null_space
from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.algebra.tucker import tucker_basis
from easyedit_moe.editors import make_editor
from easyedit_moe.errors import EditingWarning, HyperParamsError, NoUpdateWarning, RidgeTooLargeWarning

E, D, H, T, K = 6, 8, 10, 7, 3


@pytest.fixture
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)
        yield


def routed(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> RoutedKeys:
    draw = torch.Generator().manual_seed(seed)
    expert = torch.stack([torch.randperm(E, generator=draw)[:K] for _ in range(T)])
    gate = torch.rand(T, K, generator=draw, dtype=torch.float64)
    gate[0, 2] = 0.0  # padding
    return RoutedKeys(expert, gate.to(dtype), (scale * torch.randn(T, K, H, generator=draw).double()).to(dtype))


def moments(scale: float = 1.0) -> torch.Tensor:
    x = torch.randn(E, 40, H, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    x = x * torch.logspace(-2, 0, H) * scale
    return x.mT @ x / 40


METRICS = {
    "identity": lambda scale: IdentityMetric(),
    "nullspace": lambda scale: null_space(moments(scale), torch.full((E,), 40), 0.01, relative=True),
    "covariance": lambda scale: covariance_metric(moments(scale), torch.full((E,), 40), 1e-3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_unit_is_the_mean_squared_norm_of_routed_gated_projected_keys(
    seed: int, metric: str, dtype: torch.dtype
) -> None:
    keys, m = routed(seed, dtype=dtype), METRICS[metric](1.0)
    psi, total = loop_psi(keys, E), 0.0
    for t in range(T):
        for j in range(E):
            total += float(psi[t, j] @ m.apply(j, psi[t, j][:, None]).squeeze(1))
    assert mean_energy(keys, m) == pytest.approx(total / T, rel=1e-10)


@pytest.mark.parametrize("ranks", [(6, 8, 10), (3, 4, 5), (6, 4, 3)])
def test_motes_unit_is_that_of_its_features(ranks: tuple[int, int, int]) -> None:
    draw = torch.Generator().manual_seed(3)
    basis = tucker_basis(torch.randn(E, D, H, generator=draw, dtype=torch.float64), *ranks)
    keys, m = routed(1), METRICS["nullspace"](1.0)
    features = core_features(keys, basis, m)
    assert core_energy(keys, basis, m) == pytest.approx(float((features**2).sum(1).mean()), rel=1e-12)
    if ranks == (6, 8, 10):  # a basis that leaves nothing out changes no norm
        assert core_energy(keys, basis, m) == pytest.approx(mean_energy(keys, m), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e4])
@pytest.mark.parametrize("solver", ["exact", "bcd", "core"])
@pytest.mark.parametrize("metric", ["identity", "nullspace", "covariance"])
def test_what_an_update_moves_does_not_depend_on_the_scale_of_the_keys(metric: str, solver: str, scale: float) -> None:
    """An absolute lambda does: at 1e-3 of the scale it leaves nothing, at 1e4 it is none."""
    if (metric, solver) == ("covariance", "core"):
        pytest.skip("MoTE has no covariance metric")
    residual = torch.randn(T, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    basis = tucker_basis(torch.randn(E, D, H, generator=torch.Generator().manual_seed(5)).double(), 4, 8, 6)
    moved, absolute = [], []
    for one in (1.0, scale):
        keys, m = routed(2, one), METRICS[metric](one)
        energy = core_energy(keys, basis, m) if solver == "core" else mean_energy(keys, m)
        for ridge, into in ((0.3 * energy, moved), (0.3, absolute)):
            if solver == "exact":
                update = solve_exact(keys, residual, ridge, m)
            elif solver == "bcd":
                update = solve_bcd(keys, residual, ridge, m, expert_orders(E, 3))[0]
            else:
                update = expand_core(solve_mote(keys, residual, ridge, m, basis), basis, m)
            into.append(update.apply(keys))
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-6, atol=1e-8)
    if metric != "covariance":  # whose units are those of the keys already
        assert (absolute[1] - absolute[0]).norm() > 0.05 * absolute[0].norm()


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("prefixes", [[], ["A quiet harbour. ", "The fox: "]], ids=["bare", "prefixes"])
@pytest.mark.parametrize("variant", ["Global", "MoEEdit-BCD", "MoTE", "MoE-MEMIT"])
def test_an_editor_takes_the_unit_of_each_layer(variant: str, prefixes: list[str], data: Path) -> None:
    """The mean over facts and contexts; the same edit by an absolute lambda, layer by layer."""
    common = {"context_prefixes": prefixes, "spread": "last"}
    hp = hparams(data, variant, lambda_reg=None, lambda_relative=0.2, **common)
    model, editor = tiny_model(), make_editor(hp, progress=False)
    editor.edit(model, TOK, facts(3))
    keys, _ = captured(tiny_model(), hp, 2, requests(3))
    unit = editor.energy(keys, editor.prepared.layers[2])
    same, other = tiny_model(), tiny_model()
    edit(same, hparams(data, variant, lambda_reg=0.2 * unit, **common), requests(3))
    edit(other, hparams(data, variant, lambda_reg=0.3 * unit, **common), requests(3))
    torch.testing.assert_close(stacked(model, 2), stacked(same, 2), rtol=0, atol=1e-7)
    assert (stacked(other, 2) - stacked(same, 2)).norm() > 1e-2 * (stacked(same, 2) - stacked(tiny_model(), 2)).norm()


def test_keys_without_anything_left_give_no_unit(data: Path) -> None:
    hp = hparams(data, "Global", lambda_reg=None, lambda_relative=0.1, low_coverage="frozen", min_coverage=10**9)
    model = tiny_model()
    with pytest.warns(NoUpdateWarning, match="min_coverage"):
        edit(model, hp, requests(2))
    assert torch.equal(stacked(model, 2), stacked(tiny_model(), 2))


def test_a_warning_names_the_setting_that_was_used(data: Path) -> None:
    hp = plain_ridge(data, "Global", lambda_reg=None, lambda_relative=300.0, layers=[2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        edit(tiny_model(), hp, requests(2))
    (told,) = [str(w.message) for w in caught if issubclass(w.category, RidgeTooLargeWarning)]
    assert "lambda_relative 300 " in told
    assert "Lower lambda_relative below" in told


# ---------------------------------------------------------------- settings


def test_one_setting_says_the_ridge_and_one_the_null_space(data: Path) -> None:
    plain = hparams(data, lambda_reg=None, nullspace_threshold=None, nullspace_relative=False)
    assert (plain.lambda_reg, plain.lambda_relative, plain.nullspace_threshold) == (1.0, None, 0.02)
    relative = hparams(data, lambda_reg=None, lambda_relative=0.1)
    assert (relative.lambda_reg, relative.lambda_relative) == (None, 0.1)
    assert type(relative).from_dict(relative.to_dict()) == relative
    energy = hparams(data, nullspace_threshold=None, nullspace_relative=False, nullspace_energy=0.9)
    assert (energy.nullspace_threshold, energy.nullspace_energy) == (None, 0.9)
    assert type(energy).from_dict(energy.to_dict()) == energy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lambda_reg": 0.1, "lambda_relative": 0.1}, "lambda_reg and lambda_relative .* set the others to null"),
        ({"nullspace_threshold": 0.1, "nullspace_energy": 0.9}, "nullspace_threshold and nullspace_energy"),
        ({"nullspace_threshold": None, "nullspace_energy": 0.9, "nullspace_rank": 2}, "energy and nullspace_rank"),
        ({"nullspace_threshold": None, "nullspace_energy": 0.9, "nullspace_relative": True}, "not null"),
        ({"nullspace_threshold": None, "nullspace_relative": False, "nullspace_energy": 1.5}, r"in \(0, 1\]"),
        ({"nullspace_threshold": None, "nullspace_relative": False, "nullspace_rank": 0.0}, "a fraction in"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_contradict_each_other(changes: dict[str, Any], message: str, data: Path) -> None:
    with pytest.raises(HyperParamsError, match=message):
        hparams(data, "MoTE", **changes)


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize(
    "changes", [{"nullspace_energy": 0.9}, {"nullspace_rank": 5}, {"nullspace_rank": 0.25}], ids=str
)
@pytest.mark.parametrize("variant", ["Global", "MoTE"])
def test_editors_take_null_spaces_by_energy_and_rank(variant: str, changes: dict[str, Any], data: Path) -> None:
    hp = hparams(data, variant, nullspace_threshold=None, nullspace_relative=False, **changes)
    editor = make_editor(hp, progress=False)
    result = editor.edit(tiny_model(), TOK, facts(2))
    for layer in editor.prepared.layers.values():
        if "nullspace_rank" in changes:
            assert set(layer.null_space) == {5 if changes["nullspace_rank"] == 5 else 6}
        else:
            assert len(set(layer.null_space)) > 1  # per expert
    assert all(report.update_norm > 0 for report in result.patch.reports)
