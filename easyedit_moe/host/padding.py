"""What EasyEdit is told of a model and its tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedTokenizerBase


@contextlib.contextmanager
def padded(tok: PreTrainedTokenizerBase) -> Iterator[None]:
    """Within, ``tok`` has a padding token, which EasyEdit needs; its own settings are back afterwards."""
    padding = tok.pad_token
    if padding is None:
        tok.pad_token = tok.eos_token
    try:
        yield
    finally:
        if padding is None:
            tok.pad_token = None


def name_for_host(model: nn.Module) -> str:
    """What EasyEdit is told the model is called: its class.

    It looks for "t5", "chatglm" and the like anywhere in a name or path, and would then take the model for another.
    """
    return type(model).__name__
