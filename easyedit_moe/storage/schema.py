"""What a file must hold: JSON by type hints, tensors by names, dtypes and shapes; nothing is converted or guessed."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyedit_moe.errors import EditingError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def content_of(path: Path, error: type[EditingError], advice: str) -> Iterator[None]:
    """Within, what is found wrong with a file's content becomes ``error``, which names the file and ``advice``."""
    try:
        yield
    except EditingError:
        raise
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is damaged: {cause}; {advice}.") from cause


# ---------------------------------------------------------------- JSON


def read_value(value: Any, hint: Any, where: str = "its content") -> Any:
    """A value of JSON as ``hint`` has it: records for objects, tuples for lists, whole numbers as keys where hinted.

    ``hint`` is a type or a hint of: str, bool, int, float, None, Any, unions, Literal, list, tuple, dict (keys: str or
    int), and dataclasses, whose fields must all be there (unless they have a default) and nothing else.

    Raises:
        ValueError: another kind of value (a bool is no number, NaN no float); the message says where.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _read_union(value, hint, where)
    if origin is typing.Literal:
        if not any(type(value) is type(one) and value == one for one in args):
            raise _other(value, hint, where)
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return read_record(value, hint, where)
    if origin is dict:
        return _read_dict(value, args, hint, where)
    if origin in (list, tuple):
        return _read_list(value, origin, args, hint, where)
    if hint is float and type(value) is int:
        value = float(value) if abs(value) < 2**53 else value
    if type(value) is not hint and not (hint in (None, type(None)) and value is None):
        raise _other(value, hint, where)
    if isinstance(value, float) and not math.isfinite(value):
        raise _other(value, hint, where)
    return value


_Record = typing.TypeVar("_Record")


def read_record(value: Any, kind: type[_Record], where: str = "its content") -> _Record:
    """A dataclass from an object of JSON; see `read_value`."""
    if not isinstance(value, Mapping):
        raise _other(value, kind, where)
    hints, known = typing.get_type_hints(kind), dataclasses.fields(typing.cast(Any, kind))
    unknown = [key for key in value if key not in {one.name for one in known}]
    if unknown:
        raise ValueError(f"{where} holds {_shown(unknown[0])}, which a {kind.__name__.strip('_')} has not")
    required = [
        one.name
        for one in known
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING and one.name not in value
    ]
    if required:
        raise ValueError(f"{where} lacks {', '.join(required)}")
    return kind(**{key: read_value(item, hints[key], f"{where}.{key}") for key, item in value.items()})


def _read_union(value: Any, hint: Any, where: str) -> Any:
    options = typing.get_args(hint)
    if value is None and type(None) in options:
        return None
    kinds = [option for option in options if option is not type(None)]
    for option in kinds[:-1]:
        try:
            return read_value(value, option, where)
        except ValueError:
            continue
    return read_value(value, kinds[-1], where)


def _read_dict(value: Any, args: tuple[Any, ...], hint: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise _other(value, hint, where)
    found = {}
    for key, item in value.items():
        known = key
        if args[0] is int and type(key) is not int:
            if not (key.isascii() and key.isdecimal() and str(int(key)) == key):
                raise ValueError(f"{where} has the key {_shown(key)}, which is no number")
            known = int(key)
        found[known] = read_value(item, args[1], f"{where}[{_shown(key)}]")
    return found


def _read_list(value: Any, origin: type, args: tuple[Any, ...], hint: Any, where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _other(value, hint, where)
    fixed = origin is tuple and Ellipsis not in args
    if fixed and len(value) != len(args):
        raise _other(value, hint, where)
    kinds = args if fixed else [args[0]] * len(value)
    return origin(
        read_value(item, kind, f"{where}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
    )


def _other(value: Any, hint: Any, where: str) -> ValueError:
    wanted = hint.__name__ if isinstance(hint, type) and typing.get_origin(hint) is None else str(hint)
    return ValueError(f"{where} is {_shown(value)}, expected {wanted.strip('_').replace('typing.', '')}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


@dataclass(frozen=True)
class Described:
    """What the metadata of every cached file says of it, at least; its key says what it is of."""

    schema: int
    kind: str
    key: dict[str, Any]


# ---------------------------------------------------------------- tensors


@dataclass(frozen=True)
class Expected:
    """A tensor that a file must hold.

    Attributes:
        shape: a number per dimension, or a letter for one that is the same wherever it stands.
        dtypes: any of these; None: one of `FLOATS`, the same for all tensors that say so.
    """

    shape: tuple[int | str, ...]
    dtypes: tuple[torch.dtype, ...] | None = None


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Expected]) -> None:
    """Refuse tensors unless they are those that are expected, all of them, and finite.

    Raises:
        ValueError: one is missing, unknown, of another dtype or shape, or holds NaN or infinity.
    """
    missing, unknown = [n for n in expected if n not in found], [n for n in found if n not in expected]
    if missing or unknown:
        lacks = f"lacks the tensor {missing[0]}" if missing else f"holds the unknown tensor {unknown[0]}"
        raise ValueError(f"it {lacks}")
    sizes: dict[str, int] = {}
    floats: set[torch.dtype] = set()
    for name, one in expected.items():
        tensor = found[name]
        fits = tensor.dim() == len(one.shape) and all(
            size == (sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted)
            for size, wanted in zip(tensor.shape, one.shape, strict=True)
        )
        floats |= {tensor.dtype} if one.dtypes is None else set()
        if not fits or tensor.dtype not in (one.dtypes or FLOATS) or len(floats) > 1:
            raise ValueError(
                f"{name} is {_described(tuple(tensor.shape), (tensor.dtype,))}, expected {_wanted(one, sizes)}"
            )
        if not _is_finite(tensor):
            raise ValueError(f"{name} is incomplete or non-finite: it holds NaN or infinity")


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; in one pass, where ``torch.isfinite`` would make copies of large tensors."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return bool(torch.isfinite(tensor).all())
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())  # NaN is both the least and the most


def _wanted(one: Expected, sizes: Mapping[str, int]) -> str:
    known = tuple(sizes.get(size, size) if isinstance(size, str) else size for size in one.shape)
    return _described(known, one.dtypes or FLOATS)


def _described(shape: tuple[int | str, ...], dtypes: tuple[torch.dtype, ...]) -> str:
    sizes = ", ".join(str(size) for size in shape)
    return f"[{sizes}] of {' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
