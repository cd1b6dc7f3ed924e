"""Null spaces on disk: decomposed once, keyed by everything they depend on, shared by methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from solving_editors import hparams
from tiny import tiny_model, tiny_tokenizer

from easyedit_moe.algebra import nullspace
from easyedit_moe.algebra.nullspace import NullSpace, null_space
from easyedit_moe.editors import make_editor
from easyedit_moe.errors import CacheError, EditingWarning, NumericalError
from easyedit_moe.statistics import null_spaces
from easyedit_moe.statistics.moments import LayerMoments
from easyedit_moe.statistics.null_spaces import NullSpaceKey, layer_null_space, load_null_space

FINGERPRINT, H = "f" * 64, 6
WAYS = [
    {"nullspace_threshold": 0.3, "nullspace_relative": True}, {"nullspace_threshold": 1.0, "nullspace_relative": False},
    {"nullspace_threshold": None, "nullspace_relative": False, "nullspace_energy": 0.8},
    {"nullspace_threshold": None, "nullspace_relative": False, "nullspace_rank": 4},
    {"nullspace_threshold": 0.3, "nullspace_relative": True, "min_coverage": 5, "low_coverage": "identity"},
    {"nullspace_threshold": 0.3, "nullspace_relative": True, "min_coverage": 5, "low_coverage": "frozen"},
    {"nullspace_threshold": 0.3, "nullspace_relative": True, "min_coverage": 5, "low_coverage": "pooled"},
]  # fmt: skip


def moments(seed: int = 0, dtype: torch.dtype = torch.float32) -> LayerMoments:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(5, H, 2 * H, generator=draw) * torch.logspace(0, -2, H)[:, None]
    return LayerMoments((x @ x.mT).to(dtype), torch.tensor([9, 2, 9, 7, 9]), torch.eye(3), 36)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry per layer that is really decomposed."""
    seen: list[Any] = []

    def counted(*args: Any, **options: Any) -> NullSpace:
        seen.append(args)
        return null_space(*args, **options)

    monkeypatch.setattr(null_spaces, "null_space", counted)
    return seen


def same(one: NullSpace, other: NullSpace) -> bool:
    return all(
        torch.equal(a.basis, b.basis) and a.complement == b.complement and b.basis.dtype == torch.float64
        for a, b in zip(one.projectors, other.projectors, strict=True)
    )


@pytest.mark.parametrize("way", WAYS)
def test_they_are_computed_once_and_read_back_bit_equal(way: dict[str, Any], calls: list[Any], tmp_path: Path) -> None:
    hp, statistics = hparams(tmp_path, "Global", **way), moments()
    first, second = (layer_null_space(1, statistics, hp, FINGERPRINT) for _ in range(2))
    assert len(calls) == 1
    assert same(first, second)
    direct = null_space(
        statistics.keys, statistics.counts, hp.nullspace_threshold, hp.nullspace_relative, hp.min_coverage,
        hp.low_coverage, hp.nullspace_energy, hp.nullspace_rank,
    )  # fmt: skip
    assert same(direct, second)


def test_whatever_they_depend_on_is_in_the_key(calls: list[Any], tmp_path: Path) -> None:
    base = hparams(tmp_path, "Global")
    cases = [
        (base, moments(), 1),
        (base, moments(seed=1), 1),
        (base, moments(), 2),
        (base, moments(0, torch.float64), 1),
    ]
    cases += [(hparams(tmp_path, "Global", **way), moments(), 1) for way in WAYS]
    for hp, statistics, layer in cases:
        layer_null_space(layer, statistics, hp, FINGERPRINT)
    assert len(calls) == len(cases)
    fewer = LayerMoments(moments().keys, torch.tensor([9, 9, 9, 9, 9]), torch.eye(3), 45)
    layer_null_space(1, fewer, base, FINGERPRINT)  # coverage decides nothing here
    assert len(calls) == len(cases)
    layer_null_space(1, fewer, hparams(tmp_path, "Global", **WAYS[-1]), FINGERPRINT)
    assert len(calls) == len(cases) + 1


def test_methods_and_later_editors_share_them(calls: list[Any], data: Path) -> None:
    spaces = []
    for method in ("Global", "MoEEdit-BCD", "MoTE", "Global"):
        prepared = make_editor(hparams(data, method), progress=False).prepare(tiny_model(), tiny_tokenizer())
        spaces.append([prepared.layers[layer].metric for layer in (1, 2)])
    assert len(calls) == 2
    assert all(same(one, other) for found in spaces for one, other in zip(found, spaces[0], strict=True))


def test_a_damaged_file_is_made_anew_and_another_key_refused(calls: list[Any], tmp_path: Path) -> None:
    hp, statistics = hparams(tmp_path, "Global"), moments()
    first = layer_null_space(1, statistics, hp, FINGERPRINT)
    (path,) = (tmp_path / "stats").rglob("nullspace-*")
    with pytest.raises(CacheError, match="layer"):
        load_null_space(path, NullSpaceKey.of(2, statistics, hp))
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.warns(EditingWarning, match="made anew"):
        assert same(layer_null_space(1, statistics, hp, FINGERPRINT), first)
    assert len(calls) == 2


@pytest.mark.parametrize("numbers", [1, 2 * H * H, 2**20])
def test_experts_are_decomposed_together(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nullspace, "CHUNK", numbers)
    seen, eigh, value = [], torch.linalg.eigh, moments()
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: (seen.append(len(x)), eigh(x))[1])
    found = null_space(value.keys, value.counts, 0.3, True, 5, "identity")
    assert seen == {1: [1, 1, 1, 1], 2 * H * H: [2, 2]}.get(numbers, [4])
    for expert, projector in enumerate(found.projectors):
        wanted = torch.eye(H).double()
        if expert != 1:
            values, vectors = eigh(value.keys[expert].double())
            free = vectors[:, values <= 0.3 * values[-1]]
            wanted = free @ free.T
        torch.testing.assert_close(projector(torch.eye(H).double()), wanted)


def test_a_decomposition_that_fails_names_the_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    value, eigh = moments(), torch.linalg.eigh

    def failing(moment: torch.Tensor) -> Any:
        if moment.dim() == 3 or torch.equal(moment, value.keys[3].double()):
            raise torch.linalg.LinAlgError("no convergence")
        return eigh(moment)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    with pytest.raises(NumericalError, match="expert 3's moment failed: no convergence"):
        null_space(value.keys, value.counts, 0.3)
