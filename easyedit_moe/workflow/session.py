"""What every command begins with: a model that is loaded as it should be, patches that are read and laid on it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.adapters.attachment import attach, detach, find_adapter
from easyedit_moe.adapters.moe_adapter import ADAPTER_FILE, MoEAdapter
from easyedit_moe.errors import EditingWarning, HyperParamsError
from easyedit_moe.hparams import DTYPES, MoEHyperParams, hparams_folder, load_hyperparams
from easyedit_moe.hparams.models import model_file
from easyedit_moe.moe.holding import intact
from easyedit_moe.moe.hub import find_source
from easyedit_moe.moe.loading import checkpoint_dtype, load_model
from easyedit_moe.patches.files import holds_adapter, load_patch
from easyedit_moe.patches.inspection import describe
from easyedit_moe.patches.tensors import TensorPatch
from easyedit_moe.patches.weights import WeightPatch
from easyedit_moe.progress import library_bars

SavedPatch = WeightPatch | TensorPatch | MoEAdapter
"""What an edit leaves on disk: a patch of weights, or MEMoE's adapter."""
Loaded = tuple[nn.Module, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Loading:
    """How a model is loaded; an empty value means the default of `loading_options`.

    Attributes:
        dtype: float32, bfloat16 or float16.
        device: "cpu", "cuda", "cuda:1" or a GPU's number.
        model_parallel: spread over all devices.
        trust_remote_code: let code that comes with the checkpoint run.
    """

    dtype: str = ""
    device: int | str = ""
    model_parallel: bool = False
    trust_remote_code: bool = False

    @staticmethod
    def of(hparams: MoEHyperParams) -> Loading:
        """As hyper-parameters say."""
        return Loading(hparams.dtype, hparams.device, hparams.model_parallel, hparams.trust_remote_code)


def loading_options(model: str, patches: Sequence[SavedPatch] = (), wanted: Loading | None = None) -> Loading:
    """How a model is loaded: as wanted; else in the dtype that the first patch was made in, or the checkpoint's own.

    The device, unless one is wanted, is that of the hparams that ship for the model, or the CPU.

    Raises:
        DataError: no model by this name. HyperParamsError: an unknown dtype.
    """
    wanted = wanted or Loading()
    if wanted.dtype and wanted.dtype not in DTYPES:
        raise HyperParamsError(f"dtype must be one of {', '.join(DTYPES)}; found {wanted.dtype!r}.")
    dtype = wanted.dtype or _made_in(patches) or checkpoint_dtype(model, wanted.trust_remote_code)
    device, parallel = wanted.device, wanted.model_parallel
    if device == "":
        usual = _usual(model)
        device = "cpu" if usual is None else usual.device
        parallel = parallel or (usual is not None and usual.model_parallel)
    return Loading(dtype, device, parallel, wanted.trust_remote_code)


def load(model: str | Loaded, options: Loading, progress: bool = True) -> Loaded:
    """A model and its tokenizer; an adapter that lies beside the checkpoint is attached.

    A pair of both is returned as it is. Raises what `load_model` and `attach` raise.
    """
    if not isinstance(model, str):
        return model
    with library_bars(progress):
        net, tok = load_model(
            model, options.dtype, options.device, options.model_parallel, trust_remote_code=options.trust_remote_code
        )
    beside = Path(find_source(model).name) / ADAPTER_FILE
    if os.path.isfile(beside):
        attach(net, tok, MoEAdapter.load(beside))
    return net, tok


def asked_in_chat(patches: Sequence[SavedPatch], wanted: bool | None) -> bool:
    """Whether prompts are asked in a chat: as wanted, else as the patches were made; by default plain text.

    Warns (EditingWarning) where patches were made the other way than they are asked now.
    """
    made = [chat for patch in patches if (chat := _made_in_chat(patch)) is not None]
    chat = (True in made and False not in made) if wanted is None else wanted
    if any(one != chat for one in made):
        how, now = ("in a chat", "as plain text") if not chat else ("on plain text", "in a chat")
        warnings.warn(
            f"A patch was made {how}, and is asked {now} here, so its answers may not show. Use --chat where the patch "
            "was made with it, and --no-chat where it was not.",
            EditingWarning,
            stacklevel=3,
        )
    return chat


def _made_in_chat(patch: SavedPatch) -> bool | None:
    """As the patch's hparams say; None where there are none."""
    about = patch.describe(None) if isinstance(patch, MoEAdapter) else describe(patch)
    said = [bool(settings["chat"]) for settings in about["settings"] if "chat" in settings]
    return any(said) if said else None


def model_name(model: str | Loaded) -> str:
    """What a report calls the model."""
    if isinstance(model, str):
        return model
    return str(getattr(model[0], "name_or_path", "") or type(model[0]).__name__)


def read_patch(patch: str | Path | SavedPatch) -> SavedPatch:
    """A patch, or an adapter, from its file or folder; one that is read already as it is.

    Raises:
        PatchError, AdapterError: neither is there.
    """
    if not isinstance(patch, (str, Path)):
        return patch
    return MoEAdapter.load(patch) if holds_adapter(patch) else load_patch(patch)


def read_patches(patches: Sequence[str | Path | SavedPatch]) -> list[SavedPatch]:
    """As `read_patch`, several."""
    return [read_patch(patch) for patch in patches]


def check_patches(net: nn.Module, tok: PreTrainedTokenizerBase, patches: Sequence[SavedPatch]) -> None:
    """Lay patches on a model and take them off again; raises as `applied` where they do not fit."""
    with applied(net, tok, patches):
        pass


@contextmanager
def applied(net: nn.Module, tok: PreTrainedTokenizerBase, patches: Sequence[SavedPatch]) -> Iterator[None]:
    """The patches lie on the model inside, each on those before it; afterwards none does, whatever was raised.

    An adapter takes the place of one that was attached before, which is put back.

    Raises:
        PatchError, AdapterError: one does not fit, or lies on the model already.
    """
    before = find_adapter(net)
    with intact(net):  # which takes them off if anything raises
        for patch in patches:
            _lay(net, tok, patch)
        yield
        for patch in reversed(patches):
            if not isinstance(patch, MoEAdapter):
                patch.revert(net)
        _put_back_adapter(net, tok, before)


def _put_back_adapter(net: nn.Module, tok: PreTrainedTokenizerBase, before: MoEAdapter | None) -> None:
    found = find_adapter(net)
    if found is before:
        return
    if found is not None:
        detach(net)
    if before is not None:
        attach(net, tok, before)


def _lay(net: nn.Module, tok: PreTrainedTokenizerBase, patch: SavedPatch) -> None:
    if not isinstance(patch, MoEAdapter):
        patch.apply(net)
        return
    former = find_adapter(net)
    with intact(net) as hold:
        hold.undo.append(lambda: _put_back_adapter(net, tok, former))
        if former is not None:
            detach(net)
        attach(net, tok, patch)


def _made_in(patches: Sequence[SavedPatch]) -> str:
    """The dtype that the first patch of weights needs; empty where no patch needs one."""
    found = (str(dtype) for patch in patches if not isinstance(patch, MoEAdapter) for dtype in patch.dtypes.values())
    return next((dtype for dtype in found if dtype in DTYPES), "")


def _usual(model: str) -> MoEHyperParams | None:
    """The hparams that ship for a model, for its device; None where there are none."""
    try:
        file, _ = model_file(hparams_folder() / "Global", model)
    except HyperParamsError:  # a model of that name, but of another architecture
        return None
    return None if file is None else load_hyperparams(file)
