"""A model and its adapter on disk, side by side, and both loaded again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.adapters.attachment import attach, find_adapter
from easyedit_moe.adapters.base_saving import BaseSaving
from easyedit_moe.adapters.moe_adapter import ADAPTER_FILE, MoEAdapter
from easyedit_moe.errors import AdapterError
from easyedit_moe.moe.loading import checkpoint_dtype, load_model
from easyedit_moe.storage.files import filled_folder, write_text
from easyedit_moe.storage.tensors import system_errors

LOADER_FILE = "load_with_adapter.py"
LOADER = """\
import sys
from pathlib import Path
from easyedit_moe.adapters.saving import load_with_adapter
model, tok = load_with_adapter(Path(__file__).resolve().parent)
print(*[tok.decode(model.generate(**tok(text, return_tensors="pt"))[0]) for text in sys.argv[1:]], sep="\\n")
"""
"""What `save_with_adapter` writes as ``load_with_adapter.py``: it answers the prompts that are its arguments."""


def save_with_adapter(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    folder: str | Path,
    save_base: Callable[[Path], Any] | None = None,
) -> None:
    """Write a checkpoint of the base, the tokenizer, ``memoe_adapter.safetensors`` and ``load_with_adapter.py``.

    Args:
        model: with an adapter attached.
        tok: its tokenizer.
        folder: made where it does not exist.
        save_base: writes the base's checkpoint, tokenizer included, into the folder; by default both are saved by their
            own ``save_pretrained``.

    Raises:
        AdapterError: no adapter is attached, or the folder holds one of another model; nothing is written then.
        WriteError: the folder can't be written.
    """
    folder, adapter = Path(folder), find_adapter(model)
    if adapter is None:
        raise AdapterError("The model has no adapter to save; use its save_pretrained.")
    adapter.check_place(folder / ADAPTER_FILE)
    with filled_folder(folder) as partial:
        if save_base is not None:
            save_base(partial)
        else:
            with _quiet(adapter), system_errors():
                of_transformers: Any = model
                of_transformers.save_pretrained(partial)
                tok.save_pretrained(partial)
        adapter.save(partial / ADAPTER_FILE)
        write_text(partial / LOADER_FILE, LOADER)


@contextmanager
def _quiet(adapter: MoEAdapter) -> Iterator[None]:
    """No warning that the adapter is left out."""
    saving: BaseSaving | None = adapter.attachment.saving
    if saving is None:
        yield
        return
    before, saving.quiet = saving.quiet, True
    try:
        yield
    finally:
        saving.quiet = before


def load_with_adapter(
    folder: str | Path, dtype: str | None = None, device: int | str = "cpu"
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model and tokenizer of a folder that `save_with_adapter` wrote, the adapter attached.

    Args:
        folder: with the checkpoint and ``memoe_adapter.safetensors``.
        dtype: float32, bfloat16 or float16; by default that of the checkpoint.
        device: "cpu", "cuda", "cuda:1" or a GPU's number.

    Raises:
        AdapterError: no adapter there, or one of another model. DataError: the checkpoint can't be loaded.
    """
    adapter = MoEAdapter.load(Path(folder) / ADAPTER_FILE)
    model, tok = load_model(str(folder), dtype or checkpoint_dtype(str(folder)), device)
    attach(model, tok, adapter)
    return model, tok
