"""What an edit changed bit by bit: the xor of a matrix before and after, compressed.

With it the edit is applied exactly on any machine, whatever its rounding, and taken back from the edited weights alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from easyedit_moe.errors import PatchError

CODEC = "byte planes, zlib"
"""How the bytes are laid out and compressed; files name it."""


def flips_between(before: Tensor, after: Tensor) -> Tensor:
    """Compressed xor of two tensors of one shape and dtype, as bytes ``[n]`` in uint8 on the CPU.

    The bytes of equal significance stand together, since an edit leaves the highest ones mostly as they were; runs
    and frequencies of bytes are coded by zlib.
    """
    return _packed(_planes(before) ^ _planes(after))


def flipped(weight: Tensor, flips: Tensor) -> Tensor:
    """``weight`` with these bits turned, on the CPU: before becomes after, and after becomes before.

    Raises:
        PatchError: the bytes are damaged, or of a tensor of another size.
    """
    planes = _planes(weight)
    turn = _unpacked(flips, planes.numel() + 1)
    if turn.numel() != planes.numel():
        raise PatchError(
            f"The originals in this patch are not of {planes.numel()} bytes, as the matrix is; save the patch anew."
        )
    turned = planes ^ turn.view(planes.shape)
    return turned.mT.contiguous().view(-1).view(weight.dtype).view(weight.shape)


def check_flips(flips: Mapping[Any, Tensor]) -> None:
    """Refuse what can't be flips by its dtype and shape.

    Raises:
        ValueError: one is not bytes in a row.
    """
    for name, bits in flips.items():
        if bits.dtype != torch.uint8 or bits.dim() != 1:
            raise ValueError(f"the original of {name} is {list(bits.shape)} of {bits.dtype}, expected bytes in a row")


def joined_flips(first: Tensor, second: Tensor) -> Tensor:
    """The flips of two edits in a row of one matrix.

    Raises:
        PatchError: damaged, or of matrices of different sizes.
    """
    one, other = _unpacked(first), _unpacked(second)
    if one.numel() != other.numel():
        raise PatchError(f"Originals of {one.numel()} and {other.numel()} bytes are not of one matrix.")
    return _packed(one ^ other)


def _planes(weight: Tensor) -> Tensor:
    """Bytes ``[size of a number, numbers]`` on the CPU."""
    flat = weight.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).view(flat.numel(), flat.element_size()).mT


def _packed(planes: Tensor) -> Tensor:
    # The bytes that do change are as good as random: a search for repetitions costs time and finds next to none.
    coder = zlib.compressobj(level=6, memLevel=9, strategy=zlib.Z_RLE)
    compressed = coder.compress(planes.contiguous().numpy().tobytes()) + coder.flush()
    return torch.frombuffer(bytearray(compressed), dtype=torch.uint8)


def _unpacked(flips: Tensor, most: int = 0) -> Tensor:
    """The bytes; no more than ``most`` of them, 0: all."""
    try:
        coder = zlib.decompressobj()
        content = bytearray(coder.decompress(flips.numpy().tobytes(), most))
        if not coder.eof or coder.unused_data:
            raise zlib.error("cut off, or too long")
    except zlib.error as error:
        raise PatchError(f"The originals in this patch are damaged ({error}); save the patch anew.") from error
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
