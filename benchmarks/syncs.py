"""How often the CPU waits for a device: counted by CUDA itself on a GPU, and by what would wait there elsewhere."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_OWN = f"{Path(__file__).parent.parent / 'easyedit_moe'}/"
_WAITING = {
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2",
    "aten::unique_consecutive", "aten::unique_dim", "aten::bincount", "aten::repeat_interleave",
    "aten::_linalg_eigh", "aten::_linalg_svd", "aten::_linalg_check_errors", "aten::cholesky_inverse",
}  # fmt: skip
"""Operations whose value, whose result's size or whether they failed the CPU needs to go on."""
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}
_READING = {Tensor.tolist, Tensor.numpy, Tensor.cpu}
"""Ways to the CPU that are no operation where the tensor lies there already."""


@contextmanager
def counted_syncs(device: str) -> Iterator[Counter[str]]:
    """Counts, by file and line of this package, what makes the CPU wait for the device inside.

    On CUDA these are the warnings of ``torch.cuda.set_sync_debug_mode``. On a CPU they are the operations that would
    wait on a GPU: values read (``item``, ``bool``, ``tolist``, ``cpu``, ``numpy``), results whose size depends on
    values (masks as indices, too), decompositions that say whether they failed, and lists that become tensors of a
    given device. Of copies from device to device nothing is seen there.
    """
    found: Counter[str] = Counter()
    with ExitStack() as stack:
        if torch.device(device).type == "cuda":
            stack.enter_context(_by_cuda(found))
        else:
            stack.enter_context(_Reads(found))
            stack.enter_context(_Operations(found))
        yield found


@contextmanager
def _by_cuda(found: Counter[str]) -> Iterator[None]:
    def note(message: Warning | str, *rest: Any, **more: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            found[_place()] += 1

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


class _Operations(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        # Where a count of repeats is given along with its sum, the result's size is known.
        sized = name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is not None
        if (name in _WAITING and not sized) or (name in _INDEXING and _by_mask(*args)):
            self.found[_place()] += 1
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        listed = func is torch.tensor and (kwargs or {}).get("device") is not None
        moved = func is Tensor.to and any(isinstance(one, str) and one == "cpu" for one in args[1:])
        if func in _READING or listed or moved:
            self.found[_place()] += 1
        return func(*args, **(kwargs or {}))


def _by_mask(_: Any, indices: Any, values: Any = None, *rest: Any) -> bool:
    """Whether a mask picks what is read or written; one number for all of it is written without a look at the mask."""
    masks = any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices)
    return masks and (values is None or values.numel() != 1)


def _place() -> str:
    """The innermost line of this package on the stack, as ``file:line``; "elsewhere" for none."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_OWN):
            return f"{name.removeprefix(_OWN)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
