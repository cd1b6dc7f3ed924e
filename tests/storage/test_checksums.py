from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.syncs import counted_syncs
from easyedit_moe.storage import checksums as checksummed
from easyedit_moe.storage.checksums import checksum, checksums, checksums_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (16, 24), (7, 1)])
def test_checksums_see_changes_and_moves(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = checksum(weight)
    assert checksum(weight.clone()) == wanted
    for i in range(weight.numel()):
        changed = weight.clone()
        changed.view(-1)[i] = -changed.view(-1)[i]
        assert checksum(changed) != wanted
        moved = weight.view(-1).clone()
        moved[[i, (i + 1) % len(moved)]] = moved[[(i + 1) % len(moved), i]]
        # Neighbours may be equal in bfloat16, and then nothing has moved.
        same = torch.equal(moved.view(shape), weight)
        assert (checksum(moved.view(shape)) == wanted) == same


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(4, 6), (5, 5), (3, 7), (1, 1)])
def test_how_a_matrix_is_stored_does_not_matter(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    packed = random(3, *shape, dtype=dtype)
    wide = random(3, shape[0], 2 * shape[1] + 1, dtype=dtype)
    for expert in range(3):
        alone = packed[expert].clone()
        assert checksum(packed[expert]) == checksum(alone)
        assert checksum(packed.mT.contiguous()[expert].mT) == checksum(alone)
        assert checksum(alone.T.contiguous().T) == checksum(alone)
        part = wide[expert, :, 1 : 1 + shape[1]]
        assert checksum(part) == checksum(part.clone())
    assert checksums(packed) == [checksum(matrix) for matrix in packed]


def test_a_square_matrix_and_its_transpose_differ() -> None:
    weight = random(6, 6)
    assert checksum(weight) != checksum(weight.T)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3, 5)])
def test_every_shape(shape: tuple[int, ...]) -> None:
    weight = random(*shape)
    assert checksum(weight) == checksum(weight.clone())
    assert checksum(nn_parameter(weight)) == checksum(weight)


def nn_parameter(weight: Tensor) -> Tensor:
    return torch.nn.Parameter(weight.clone())


@pytest.mark.parametrize("tile", [1, 200, 2**23])
def test_many_of_any_kind_are_those_of_each(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksummed, "TILE_BYTES", tile)
    packed = random(6, 8, 4)
    weights = [*packed, *packed.mT, random(5, 3, dtype=torch.bfloat16), random(7), random(0, 4), *random(3, 8, 4)]
    with counted_syncs("cpu") as found:
        values = checksums_of(weights)
    assert values == [checksum(weight) for weight in weights]
    assert sum(found.values()) == 1
    assert checksums_of([]) == []
