"""Contents that a file of ours can't have: tensors and metadata changed by kind, and bytes changed anywhere."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Set
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
VALUES: dict[str, Any] = {
    "null": None,
    "a text": "3",
    "a number": 3,
    "a fraction": 2.5,
    "true": True,
    "a list": [1, [2]],
    "an object": {"a": {"b": [None]}},
}
"""Values of every kind of JSON; each stands in for those of all other kinds."""


def of_tensors(tensors: Tensors) -> Iterator[tuple[str, Tensors]]:
    """Name of a mutation, and the tensors after it, for every tensor and whatever makes it another."""
    yield "no tensor at all", {}
    yield "a tensor too many", {**tensors, "extra": torch.zeros(2)}
    for name, tensor in tensors.items():
        rest = {other: value for other, value in tensors.items() if other != name}
        yield "a tensor missing", rest
        yield "a tensor renamed", {**rest, f"{name}x": tensor}
        for kind, value in _changed(tensor):
            yield kind, {**tensors, name: value.contiguous()}


def _changed(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    for dtype in DTYPES:
        if dtype != tensor.dtype:
            yield f"as {str(dtype).removeprefix('torch.')}", tensor.to(dtype)
    yield "a dimension more", tensor[None].clone()
    yield "two dimensions more", tensor[None, None].clone()
    if tensor.dim():
        yield "a row fewer", tensor[:-1].clone()
        yield "a row more", torch.cat([tensor, tensor[-1:]])
        yield "empty", tensor[:0].clone()
        yield "a single number", tensor.reshape(-1)[0].clone()
    if tensor.dim() > 1:
        turned = tensor.permute(*reversed(range(tensor.dim())))
        if turned.shape != tensor.shape:
            yield "transposed", turned.clone()
        yield "flattened", tensor.reshape(-1).clone()
        yield "a column fewer", tensor[..., :-1].clone()
    if tensor.is_floating_point():
        for kind, value in {"NaN": float("nan"), "infinity": float("inf"), "minus infinity": -float("inf")}.items():
            bad = tensor.clone()
            bad.view(-1)[-1] = value
            yield kind, bad
    elif tensor.dtype == torch.int64 and tensor.numel():
        yield "a negative number", -tensor.abs() - 1


def of_json(content: dict[str, Any], nullable: Set[str] = frozenset()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of a mutation, and the object after it: every entry, down to the third level, missing or of another kind.

    ``nullable`` are names of entries that may be null.
    """
    yield "an entry too many", {**content, "extra": 1}
    for path in _paths(content, 3):
        name = str(path[-1])
        original = _at(content, path)
        if len(path) == 1:
            yield "an entry missing", _without(content, path)
        for kind, value in VALUES.items():
            if _kind(value) == _kind(original) or (value is None and name in nullable):
                continue
            if kind == "a number" and isinstance(original, float):
                continue
            if kind == "a text" and original is None and name in nullable:
                continue
            yield f"{kind} in its place", _with(content, path, value)


def of_bytes(content: bytes, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """``count`` files with one bit changed, at places that a seed draws."""
    draw = random.Random(seed)
    for _ in range(count):
        place = draw.randrange(len(content))
        changed = content[place] ^ (1 << draw.randrange(8))
        yield "a bit changed", content[:place] + bytes([changed]) + content[place + 1 :]


def _kind(value: Any) -> str:
    return type(value).__name__


def _paths(value: Any, depth: int, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if above:
        yield above
    if depth and isinstance(value, dict):
        for key in value:
            yield from _paths(value[key], depth - 1, (*above, key))
    elif depth and isinstance(value, list) and value:
        yield from _paths(value[0], depth - 1, (*above, 0))


def _at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def _with(content: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    new = copy.deepcopy(content)
    _at(new, path[:-1])[path[-1]] = value
    return new


def _without(content: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    new = copy.deepcopy(content)
    del _at(new, path[:-1])[path[-1]]
    return new
