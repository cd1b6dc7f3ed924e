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
_WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::bincount"}
"""Operations whose value, or whose result's size, the CPU needs to go on."""
_READING = {Tensor.tolist, Tensor.numpy, Tensor.cpu}
"""Ways to the CPU that are no operation where the tensor lies there already."""


@contextmanager
def counted_syncs(device: str) -> Iterator[Counter[str]]:
    """Counts, by file and line of this package, what makes the CPU wait for the device inside.

    On CUDA these are the warnings of ``torch.cuda.set_sync_debug_mode``. On a CPU they are the operations that would
    wait on a GPU: values read (``item``, ``bool``, ``tolist``, ``cpu``, ``numpy``), and results whose size depends on
    values.
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
        if func._schema.name in _WAITING:
            self.found[_place()] += 1
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING:
            self.found[_place()] += 1
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost line of this package on the stack, as ``file:line``; "elsewhere" for none."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_OWN):
            return f"{name.removeprefix(_OWN)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
