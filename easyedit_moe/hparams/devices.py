"""What a text or a number says of a device."""

from __future__ import annotations

from typing import Any

import torch

from easyedit_moe.errors import HyperParamsError, shown


def device_named(device: Any) -> torch.device:
    """The device that is meant, whether it is there or not: "cpu", "cuda", "cuda:1", or the number of a GPU.

    Raises:
        HyperParamsError: something else.
    """
    try:
        if type(device) is int:
            return torch.device("cuda", device)
        if isinstance(device, str):
            return torch.device(device)
    except (RuntimeError, ValueError) as error:
        raise _refusal(device) from error
    raise _refusal(device)


def _refusal(device: Any) -> HyperParamsError:
    return HyperParamsError(f"device must be 'cpu', 'cuda', 'cuda:N' or a number; found {shown(device)}.")
