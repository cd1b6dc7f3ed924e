"""Which tensors of a checkpoint hold a parameter of the model in memory, and in which orientation.

transformers converts on loading (experts stored one by one become one packed parameter, prefixes change), so the names
in a file are not those in memory. Here a checkpoint is loaded on the meta device, by transformers' own code and from
the headers of its files alone; the conversions that were used are then reversed on an empty parameter, and where its
views end up says what lies where.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from easyedit_moe.checkpoints.shards import Checkpoint
from easyedit_moe.errors import CheckpointError
from easyedit_moe.moe.loading import empty_load, empty_model

Row = int | range | None
"""A part of a parameter: an entry of its first dimension, neighbouring ones as one block, or, for None, all of it."""


@dataclass(frozen=True)
class Piece:
    """A checkpoint tensor that holds a block of a parameter.

    Attributes:
        tensor: name in the checkpoint.
        shape: its shape there.
        origin: the parameter's index of the tensor's first number.
        axes: for each dimension of the tensor, the dimension of the parameter along which it runs.
    """

    tensor: str
    shape: tuple[int, ...]
    origin: tuple[int, ...]
    axes: tuple[int, ...]


class CheckpointNames:
    """The model of a checkpoint, without weights, and the way from its parameters to the checkpoint's tensors.

    Args:
        folder: of the checkpoint, whose config.json says what the model is.
        checkpoint: its tensors.
        trust_remote_code: let code that comes with the checkpoint run.

    Attributes:
        model: the model on the meta device.
        missing: parameters that transformers would draw at random.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, trust_remote_code: bool = False) -> None:
        self.checkpoint = checkpoint
        shapes = {name: (entry.shape, entry.dtype) for name, entry in checkpoint.tensors.items()}
        try:
            self.model, report = empty_load(empty_model(str(folder), trust_remote_code=trust_remote_code), shapes)
        except RuntimeError as error:
            raise CheckpointError(f"transformers can't load what is in {folder}: {error}") from error
        self.missing = sorted(report["missing_keys"])
        self.parameters = dict(self.model.named_parameters())

    def of(self, checkpoint: Checkpoint) -> CheckpointNames:
        """The same way to another checkpoint of the same names and shapes (edited MXFP4 layers may be dense there)."""
        names = copy(self)
        names.checkpoint = checkpoint
        return names

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """The tensors that hold a parameter, which together cover it.

        Raises:
            CheckpointError: the model has no such parameter, the checkpoint lacks it, or stores it in a form that
                can't be followed (fused with another one, or with interleaved rows).
        """
        pieces = tuple(self._piece(name, target, view) for target, view in self._reversed(name).items())
        if sum(math.prod(piece.shape) for piece in pieces) != self.parameters[name].numel():
            raise CheckpointError(f"The tensors {_listed(pieces)} of the checkpoint do not make up {name}.")
        return pieces

    def stored_names(self, name: str) -> list[str]:
        """Names under which a plain checkpoint would hold a parameter, whether this one does or not."""
        return sorted(self._reversed(name))

    def _reversed(self, name: str) -> dict[str, Tensor]:
        if name not in self.parameters:
            raise CheckpointError(f"{type(self.model).__name__} has no parameter {name}.")
        empty = torch.empty(self.parameters[name].shape, device="meta").as_subclass(_Traced)
        try:
            found = revert_weight_conversion(self.model, {name: empty})
        except (ValueError, RuntimeError, IndexError) as error:
            raise CheckpointError(
                f"The way in which the checkpoint stores {name} can't be followed: {error}"
            ) from error
        storage = empty.untyped_storage()._cdata
        if any(view.untyped_storage()._cdata != storage for view in found.values()):
            raise CheckpointError(
                f"The checkpoint stores {name} fused with other parameters or reordered, which this package can't edit "
                "on disk. Edit the loaded model and save it."
            )
        return found

    def _piece(self, name: str, target: str, view: Tensor) -> Piece:
        stored = self._stored(target, name)
        shape = self.checkpoint.tensors[stored].shape
        parameter = self.parameters[name]
        traced = view if tuple(view.shape) == shape or view.dim() < 2 else view.mT
        axes = _axes(traced, tuple(parameter.shape))
        if tuple(traced.shape) != shape or axes is None:
            raise CheckpointError(
                f"{stored} is stored as {shape}, and {name} is {tuple(parameter.shape)} in memory; how the one becomes "
                "the other can't be followed. Edit the loaded model and save it."
            )
        return Piece(stored, shape, _index(int(traced.storage_offset()), tuple(parameter.shape)), axes)

    def _stored(self, target: str, name: str) -> str:
        """The checkpoint's tensor of this name, under another prefix of the base model where it has one."""
        prefix = getattr(self.model, "base_model_prefix", "") + "."
        for candidate in (target, prefix + target, target.removeprefix(prefix), name):
            if candidate in self.checkpoint.tensors:
                return candidate
        raise CheckpointError(f"The checkpoint has no tensor {target}, which should hold {name}.")


class _Traced(Tensor):
    """An empty tensor that stays a view on its origin when code asks for a contiguous copy."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.contiguous:
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


def part_shape(shape: Sequence[int], row: Row) -> tuple[int, ...]:
    """Shape of a part of a parameter."""
    if isinstance(row, range):
        return (len(row), *shape[1:])
    return tuple(shape if row is None else shape[1:])


def read_parameter(checkpoint: Checkpoint, pieces: Sequence[Piece], shape: Sequence[int], row: Row) -> Tensor:
    """A parameter of this shape as in memory, or a part of it, put together from its pieces."""
    shape = part_shape(shape, row)
    out: Tensor | None = None
    for piece, inner in _parts(pieces, row):
        part = _in_memory(piece, checkpoint.read(piece.tensor, inner), len(shape))
        out = part.new_empty(shape) if out is None else out
        _block(piece, out).copy_(part)
    if out is None:
        raise CheckpointError("A parameter without tensors can't be read.")
    return out


def write_parameter(checkpoint: Checkpoint, pieces: Sequence[Piece], value: Tensor, row: Row) -> None:
    """Write a parameter, or a part of it, into the tensors that hold it."""
    for piece, inner in _parts(pieces, row):
        checkpoint.write(piece.tensor, _on_disk(piece, _block(piece, value)), inner)


def row_tensors(pieces: Sequence[Piece], row: Row) -> list[str]:
    """Names of the tensors that hold a parameter, or a part of it."""
    return [piece.tensor for piece, _ in _parts(pieces, row)]


def _parts(pieces: Sequence[Piece], row: Row) -> list[tuple[Piece, Row]]:
    """What of each piece holds a parameter or a part of it, and which part of the piece's tensor that is."""
    if row is None:
        return [(piece, None) for piece in pieces]
    if isinstance(row, range):
        return _of_rows(pieces, row)
    return [(_without_row(piece), inner) for piece, inner in _of_row(pieces, row)]


def _of_rows(pieces: Sequence[Piece], rows: range) -> list[tuple[Piece, Row]]:
    """What the pieces hold of neighbouring rows, and where in each piece's tensor it is."""
    found: list[tuple[Piece, Row]] = []
    for piece in pieces:
        if piece.axes[0] != 0:
            raise CheckpointError(f"{piece.tensor} does not hold the rows of its parameter one after the other.")
        first, last = max(rows.start, piece.origin[0]), min(rows.stop, piece.origin[0] + piece.shape[0])
        if first < last:
            origin = (first - rows.start, *piece.origin[1:])
            part = Piece(piece.tensor, (last - first, *piece.shape[1:]), origin, piece.axes)
            found.append((part, range(first - piece.origin[0], last - piece.origin[0])))
    return found


def _of_row(pieces: Sequence[Piece], row: int) -> list[tuple[Piece, int | None]]:
    """The pieces with a part of one entry, and which entry of the piece it is (None: the piece lies within it)."""
    found: list[tuple[Piece, int | None]] = []
    for piece in pieces:
        if 0 not in piece.axes:
            if piece.origin[0] == row:
                found.append((piece, None))
        elif piece.axes[0] == 0 and piece.origin[0] <= row < piece.origin[0] + piece.shape[0]:
            found.append((piece, row - piece.origin[0]))
        elif piece.axes[0] != 0:
            raise CheckpointError(f"{piece.tensor} does not hold the experts one after the other.")
    return found


def _without_row(piece: Piece) -> Piece:
    """The part of a piece within one entry of the parameter's first dimension."""
    shape, axes = (piece.shape[1:], piece.axes[1:]) if 0 in piece.axes else (piece.shape, piece.axes)
    return Piece(piece.tensor, shape, piece.origin[1:], tuple(axis - 1 for axis in axes))


def _in_memory(piece: Piece, value: Tensor, dimensions: int) -> Tensor:
    """A piece's tensor with the parameter's dimensions in their order."""
    order = sorted(range(len(piece.axes)), key=lambda k: piece.axes[k])
    out = value.permute(order)
    for axis in range(dimensions):
        if axis not in piece.axes:
            out = out.unsqueeze(axis)
    return out


def _on_disk(piece: Piece, block: Tensor) -> Tensor:
    """A block of the parameter as the piece's tensor."""
    for axis in reversed(range(block.dim())):
        if axis not in piece.axes:
            block = block.squeeze(axis)
    order = sorted(piece.axes)
    return block.permute([order.index(axis) for axis in piece.axes]).contiguous()


def _block(piece: Piece, value: Tensor) -> Tensor:
    """The block of a parameter that a piece holds, as a view."""
    for axis in range(value.dim()):
        length = piece.shape[piece.axes.index(axis)] if axis in piece.axes else 1
        value = value.narrow(axis, piece.origin[axis], length)
    return value


def _axes(view: Tensor, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Along which dimension of a contiguous parameter each dimension of a view runs; None where it is not one."""
    strides = torch.empty(shape, device="meta").stride()
    free = list(range(len(shape)))
    out: list[int] = []
    for length, stride in zip(view.shape, view.stride(), strict=True):
        fitting = [axis for axis in free if (strides[axis] == stride or length == 1) and shape[axis] >= length]
        exact = [axis for axis in fitting if strides[axis] == stride]
        if not fitting:
            return None
        out.append((exact or fitting)[0])
        free.remove(out[-1])
    return tuple(out)


def _index(offset: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The index of the ``offset``-th number of a tensor."""
    out = []
    for length in reversed(shape):
        out.append(offset % length)
        offset //= length
    return tuple(reversed(out))


def _listed(pieces: Sequence[Piece]) -> str:
    names = [piece.tensor for piece in pieces]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
