"""What an edit leaves on disk: a patch or an adapter, on request a checkpoint, and the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_moe.adapters.attachment import attach, detach
from easyedit_moe.adapters.moe_adapter import ADAPTER_FILE
from easyedit_moe.adapters.saving import save_with_adapter
from easyedit_moe.checkpoints.apply import edit_of
from easyedit_moe.checkpoints.saving import save_edited
from easyedit_moe.editors.memoe import AdapterPatch
from easyedit_moe.errors import CheckpointError
from easyedit_moe.patches.merging import merge
from easyedit_moe.patches.tensors import TensorPatch
from easyedit_moe.patches.weights import WeightPatch
from easyedit_moe.workflow.edit_outcome import EditReport
from easyedit_moe.workflow.edit_report import write_report
from easyedit_moe.workflow.session import Loaded, model_name

SAVED = ("patch", "checkpoint")
PATCH_FILE = "patch.safetensors"
CHECKPOINT = "checkpoint"

AnyPatch = WeightPatch | TensorPatch | AdapterPatch


def check_saved_kinds(save: Sequence[str], out: str | Path | None) -> None:
    """Refuse what can't be saved.

    Raises:
        CheckpointError: an unknown kind, or nothing to save though there is a folder.
    """
    unknown = [kind for kind in save if kind not in SAVED]
    if unknown or (out is not None and not save):
        found = repr(unknown[0]) if unknown else "nothing"
        raise CheckpointError(f"What is saved must be of {', '.join(SAVED)}; found {found}.")


def chained(patches: Sequence[Any]) -> AnyPatch:
    """One patch of all batches; an adapter holds all of its batches anyway."""
    last: AnyPatch = patches[-1]
    if len(patches) == 1 or isinstance(last, AdapterPatch):
        return last
    return merge(patches)


def save_edit(
    report: EditReport,
    patch: AnyPatch,
    loaded: tuple[str | Loaded, nn.Module, PreTrainedTokenizerBase],
    folder: Path,
    out: Path,
    save: Sequence[str],
    keep_originals: bool,
) -> EditReport:
    """Write everything into ``folder``, which will be ``out``; the report with the files' names.

    Raises:
        CheckpointError, PatchError: see `save_edited` and `WeightPatch.save`.
    """
    files: list[Path] = []
    if "patch" in save:
        files.append(out / _save_patch(patch, folder, keep_originals))
    if "checkpoint" in save:
        _save_checkpoint(patch, report, loaded, folder / CHECKPOINT)
        files.append(out / CHECKPOINT)
    report = replace(report, files=(*files, out / "report.json", out / "report.md"))
    write_report(report, folder)
    return report


def _save_patch(patch: AnyPatch, folder: Path, keep_originals: bool) -> str:
    if isinstance(patch, AdapterPatch):
        patch.save(folder / ADAPTER_FILE)
        return ADAPTER_FILE
    patch.save(folder / PATCH_FILE, keep_originals)
    return PATCH_FILE


def _save_checkpoint(
    patch: AnyPatch,
    report: EditReport,
    loaded: tuple[str | Loaded, nn.Module, PreTrainedTokenizerBase],
    folder: Path,
) -> None:
    model, net, tok = loaded
    source = model_name(model)
    if not isinstance(patch, AdapterPatch):
        save_edited(_pretrained(net), tok, folder, source, [edit_of(patch)])
        return
    save_with_adapter(net, tok, folder, _base_saver(net, tok, source))


def _base_saver(net: nn.Module, tok: PreTrainedTokenizerBase, source: str) -> Callable[[Path], Any]:
    """Writes the checkpoint that an adapter hangs beside: the base as it is without."""

    def save(folder: Path) -> None:
        adapter = detach(net)
        try:
            save_edited(_pretrained(net), tok, folder, source)
        finally:
            attach(net, tok, adapter)

    return save


def _pretrained(net: nn.Module) -> PreTrainedModel:
    if not isinstance(net, PreTrainedModel):
        raise CheckpointError(
            f"A checkpoint can be saved of a model of transformers; found {type(net).__name__}. Save the patch."
        )
    return net
