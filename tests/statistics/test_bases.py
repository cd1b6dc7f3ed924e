"""Tucker bases on disk: computed once, keyed by everything they depend on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from easyedit_moe.algebra.tucker import TuckerBasis, tucker_basis
from easyedit_moe.errors import CacheError
from easyedit_moe.hparams import MoTEHyperParams
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.statistics import bases
from easyedit_moe.statistics.bases import BasisKey, basis_key, content_hash, layer_basis, load_basis, save_basis
from easyedit_moe.statistics.moments import LayerMoments
from easyedit_moe.storage.tensors import write_safetensors

FINGERPRINT = "f" * 64


def hparams(folder: Path, **changes: Any) -> MoTEHyperParams:
    values = {
        "alg_name": "MoTE", "model_name": "tiny", "layers": [1], "stats_dir": str(folder), "rank_expert": 3,
        "rank_out": 0.5, "rank_in": 5, "whitening": "in",
    }  # fmt: skip
    return MoTEHyperParams(**{**values, **changes})


def moments(view: MoELayerView, seed: int = 0) -> LayerMoments:
    layout = view.layers[1].experts.layout
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(layout.num_experts, layout.d_hidden, 2 * layout.d_hidden, generator=draw)
    y = torch.randn(layout.d_model, 2 * layout.d_model, generator=draw)
    counts = torch.full((layout.num_experts,), 9)
    return LayerMoments(x @ x.mT, counts, y @ y.T, 72)


@pytest.fixture
def view() -> MoELayerView:
    return MoELayerView(tiny_model())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry per decomposition that really runs."""
    seen: list[Any] = []

    def counted(*args: Any, **options: Any) -> TuckerBasis:
        seen.append(args)
        return tucker_basis(*args, **options)

    monkeypatch.setattr(bases, "tucker_basis", counted)
    return seen


@pytest.mark.parametrize("whitening", ["none", "in", "out", "both"])
def test_a_basis_is_computed_once_and_read_back_bit_equal(
    whitening: str, view: MoELayerView, calls: list[Any], tmp_path: Path
) -> None:
    hp, statistics = hparams(tmp_path, whitening=whitening), moments(view)
    first = layer_basis(view.layers[1], hp, statistics, FINGERPRINT)
    second = layer_basis(view.layers[1], hp, statistics, FINGERPRINT)
    assert len(calls) == 1
    for name in ("u_expert", "u_out", "u_in"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.relative_error == second.relative_error
    direct = tucker_basis(
        view.layers[1].experts.stacked(), 3, 0.5, 5, 0, whitening, statistics.pooled(), statistics.output, 1e-5
    )
    assert torch.equal(direct.u_in, first.u_in)


@pytest.mark.parametrize("family", ["gpt_oss", "modulelist"])
def test_other_layouts_are_cached_too(family: str, calls: list[Any], tmp_path: Path) -> None:
    view = MoELayerView(tiny_model(family))
    for _ in range(2):
        basis = layer_basis(view.layers[1], hparams(tmp_path, whitening="none"), None, FINGERPRINT)
    assert len(calls) == 1
    wanted = tucker_basis(view.layers[1].experts.stacked(), 3, 0.5, 5)
    assert torch.equal(basis.u_out, wanted.u_out)


@pytest.mark.parametrize(
    "change",
    [{"rank_in": 4}, {"rank_out": 0.25}, {"whitening": "both"}, {"whitening_eps": 1e-3}, {"hooi_sweeps": 1}],
    ids=str,
)
def test_other_settings_do_not_share_a_file(
    change: dict[str, Any], view: MoELayerView, calls: list[Any], tmp_path: Path
) -> None:
    layer_basis(view.layers[1], hparams(tmp_path), moments(view), FINGERPRINT)
    layer_basis(view.layers[1], hparams(tmp_path, **change), moments(view), FINGERPRINT)
    assert len(calls) == 2


def test_other_weights_statistics_and_models_do_not_share_a_file(
    view: MoELayerView, calls: list[Any], tmp_path: Path
) -> None:
    hp = hparams(tmp_path)
    layer_basis(view.layers[1], hp, moments(view), FINGERPRINT)
    layer_basis(view.layers[1], hp, moments(view, seed=1), FINGERPRINT)
    layer_basis(view.layers[1], hp, moments(view), "e" * 64)
    # One down-projection changes, which the model's fingerprint does not tell.
    with torch.no_grad():
        view.layers[1].experts.read(3)[0, 0] += 1
    layer_basis(view.layers[1], hp, moments(view), FINGERPRINT)
    assert len(calls) == 4
    # Statistics that do not whiten do not matter.
    layer_basis(view.layers[1], hparams(tmp_path, whitening="none"), moments(view), FINGERPRINT)
    layer_basis(view.layers[1], hparams(tmp_path, whitening="none"), moments(view, seed=1), FINGERPRINT)
    assert len(calls) == 5


def stored(view: MoELayerView, folder: Path) -> tuple[Path, BasisKey]:
    key = basis_key(view.layers[1], hparams(folder, whitening="none"), [], FINGERPRINT)
    path = folder / key.file_name()
    save_basis(path, key, tucker_basis(view.layers[1].experts.matrices(), 3, 16, 5))
    return path, key


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "e"}, {"layer": 2}, {"weights": "e"}, {"ranks": (1, 2, 3)}, {"whitening": "in"},
        {"whitening_eps": 0.1}, {"hooi_sweeps": 3}, {"statistics": "e"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_file_of_another_key_is_refused(change: dict[str, Any], view: MoELayerView, tmp_path: Path) -> None:
    path, key = stored(view, tmp_path)
    other = replace(key, **change)
    assert other.file_name() != key.file_name()
    with pytest.raises(CacheError, match=next(iter(change))):
        load_basis(path, other)


def test_damaged_files_are_refused_and_left_alone(view: MoELayerView, tmp_path: Path) -> None:
    path, key = stored(view, tmp_path)
    load_basis(path, key)
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[: len(whole) // 2], b"", b"nonsense"):
        path.write_bytes(damaged)
        with pytest.raises(CacheError, match="computed anew"):
            load_basis(path, key)
        assert path.read_bytes() == damaged
    part, twin = torch.ones(2, 2), torch.ones(2, 2)
    for tensors, metadata in (
        ({"u_expert": part, "u_out": twin}, {"schema": 1, "kind": "basis", "key": key.content(), "relative_error": 0}),
        (
            {"u_expert": part, "u_out": part * float("nan"), "u_in": twin},
            {"schema": 1, "kind": "basis", "key": key.content(), "relative_error": 0},
        ),
        ({"u_expert": part}, {"schema": 1, "kind": "moments", "key": key.content()}),
    ):
        write_safetensors(path, tensors, metadata)
        with pytest.raises(CacheError):
            load_basis(path, key)


def test_content_hash_sees_bits_shapes_and_dtypes() -> None:
    one = torch.arange(6, dtype=torch.float32)
    assert content_hash([one]) == content_hash([one.clone()])
    assert content_hash([one.reshape(2, 3).T]) == content_hash([one.reshape(2, 3).T.contiguous()])
    others = [[-one], [one.reshape(2, 3)], [one.to(torch.float64)], [one.flip(0)], [one, one], [one[:3], one[3:]]]
    assert len({content_hash(other) for other in [*others, [one]]}) == 7
    assert content_hash([one.bfloat16()]) == content_hash([one.bfloat16()])


def test_ranks_by_energy_have_a_file_of_their_own(view: MoELayerView, calls: list[Any], tmp_path: Path) -> None:
    by_energy = {"rank_expert": None, "rank_out": None, "rank_in": None, "tucker_energy": [0.9, 0.8, 0.7]}
    hp = hparams(tmp_path, whitening="none", **by_energy)
    first = layer_basis(view.layers[1], hp, None, FINGERPRINT)
    again = layer_basis(view.layers[1], hp, None, FINGERPRINT)
    assert len(calls) == 1
    assert torch.equal(first.u_in, again.u_in)
    wanted = tucker_basis(view.layers[1].experts.stacked(), 1, 1, 1, energy=(0.9, 0.8, 0.7))
    assert torch.equal(first.u_in, wanted.u_in)
    assert first.u_in.shape[1] < view.layers[1].experts.layout.d_hidden
    by_energy["tucker_energy"] = [0.9, 0.8, 0.75]
    layer_basis(view.layers[1], hparams(tmp_path, whitening="none", **by_energy), None, FINGERPRINT)
    assert len(calls) == 2
