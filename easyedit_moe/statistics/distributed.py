"""The little that statistics need of torch.distributed; alone where no process group was started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def process_group() -> Iterator[int | None]:
    """Inside, the processes that ``torchrun`` started are one group; yields this one's number on its machine.

    Outside ``torchrun`` nothing is started, and None is yielded.
    """
    if not dist.is_available() or "LOCAL_RANK" not in os.environ:
        yield None
        return
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield local
    finally:
        dist.destroy_process_group()


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of all processes' tensors, on this one's device; the tensor itself where there is one process."""
    return _reduced(value, "SUM")


def least_over_processes(value: int) -> int:
    """The smallest of all processes' numbers."""
    return int(_reduced(torch.tensor(value), "MIN"))


def from_first_process(value: int) -> int:
    """What the first process says."""
    rank, _ = rank_and_size()
    return int(_reduced(torch.tensor(value if rank == 0 else 0), "SUM"))


def _reduced(value: Tensor, how: str) -> Tensor:
    if rank_and_size()[1] == 1:
        return value
    # NCCL sees GPUs only, Gloo the CPU best.
    where = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    moved = value.to(where, copy=True)
    dist.all_reduce(moved, getattr(dist.ReduceOp, how))
    return moved.to(value.device)
