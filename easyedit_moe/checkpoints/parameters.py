"""The parameters of a model, read from and written into the files of its checkpoint, one matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from easyedit_moe.checkpoints import mxfp4
from easyedit_moe.checkpoints.naming import (
    CheckpointNames,
    Piece,
    Row,
    part_shape,
    read_parameter,
    row_tensors,
    write_parameter,
)
from easyedit_moe.errors import CheckpointError


class StoredParameters:
    """Parameters by their names in memory, in the orientation they have there.

    Args:
        names: the checkpoint, and where its tensors belong.
    """

    def __init__(self, names: CheckpointNames) -> None:
        self.names, self.checkpoint = names, names.checkpoint
        self._pieces: dict[str, tuple[Piece, ...]] = {}

    def is_mxfp4(self, name: str) -> bool:
        """Whether the parameter is stored as MXFP4 blocks and scales."""
        return mxfp4.is_stored(self.checkpoint, name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which `read` returns the parameter."""
        if self.is_mxfp4(name):
            return mxfp4.DTYPE
        return self.checkpoint.tensors[self.pieces(name)[0].tensor].dtype

    def tensors(self, name: str, row: Row = None) -> list[str]:
        """Names in the checkpoint of what holds the parameter, or a part of it."""
        return mxfp4.tensors_of(name) if self.is_mxfp4(name) else row_tensors(self.pieces(name), row)

    def read(self, name: str, row: Row = None) -> Tensor:
        """The parameter, or a part of it; MXFP4 is dequantised."""
        if self.is_mxfp4(name):
            return mxfp4.read(self.checkpoint, name, row)
        return read_parameter(self.checkpoint, self.pieces(name), self.shape(name), row)

    def write(self, name: str, value: Tensor, row: Row = None) -> None:
        """Overwrite the parameter, or a part of it, in its files.

        Raises:
            CheckpointError: it is stored quantised, or in another shape or dtype than ``value``.
        """
        if self.is_mxfp4(name):
            raise CheckpointError(f"{name} is stored as MXFP4, which takes no update; it must be made dense first.")
        expected = part_shape(self.shape(name), row)
        if tuple(value.shape) != expected or value.dtype != self.dtype(name):
            raise CheckpointError(
                f"{name} is stored as {expected} of {self.dtype(name)}; found {tuple(value.shape)} of {value.dtype}."
            )
        write_parameter(self.checkpoint, self.pieces(name), value, row)

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """As `CheckpointNames.pieces`, found once."""
        if name not in self._pieces:
            self._pieces[name] = self.names.pieces(name)
        return self._pieces[name]

    def shape(self, name: str) -> Sequence[int]:
        """Shape of the parameter in memory."""
        return tuple(self.names.parameters[name].shape)
