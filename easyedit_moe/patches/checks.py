"""What is checked before a patch is written or taken back: the right model, in the right state, nothing in between."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from easyedit_moe.errors import AlreadyAppliedError, PatchError
from easyedit_moe.moe.fingerprint import model_fingerprint, plain_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.wrappers import own_parameters
from easyedit_moe.storage.checksums import checksums_of

Base = nn.Module | Mapping[str, Tensor] | Callable[[str], Tensor]
"""Where originals are read from: a model, a state dict, or a function of a parameter's full name."""


@dataclass(frozen=True)
class Compared:
    """The checksum of a matrix on a model beside those that a patch knows: before and after it."""

    name: str
    found: int
    before: int
    after: int


def check_not_applied(originals: object) -> None:
    """Refuse a patch that holds originals: it lies on a model.

    Raises:
        AlreadyAppliedError: it is applied.
    """
    if originals:
        raise AlreadyAppliedError("This patch is already applied; revert it first.")


def check_model(view: MoELayerView, fingerprint: str, without: Iterable[str] = (), parent: str | None = None) -> None:
    """Refuse a model whose fingerprint, parameters ``without`` left out, is another; adapters on it do not count.

    Raises:
        PatchError: the patch was made for another model.
    """
    without = set(without)
    found = model_fingerprint(view, without)
    if fingerprint in (found, plain_fingerprint(view, without)):
        return
    missing = f" It was made on a model with patch {parent}: apply that one first." if parent else ""
    if any(parameter.is_meta for parameter in view.model.parameters()):
        missing += " Parts of this model are offloaded (on the meta device), and can't be compared."
    raise PatchError(
        f"This patch was made for another model: expected fingerprint {fingerprint[:16]}, found {found[:16]}. Load "
        f"the model it was made for, in the same dtype.{missing}"
    )


def check_unedited(compared: Sequence[Compared], parent: str | None) -> None:
    """Refuse to apply a patch unless every matrix is as it was when the patch was made.

    Raises:
        AlreadyAppliedError: every matrix holds what the patch writes. PatchError: anything else.
    """
    if all(c.found == c.before for c in compared):
        return
    if all(c.found == c.after for c in compared):
        raise AlreadyAppliedError("This patch is already applied: every matrix holds what it writes.")
    first = next(c for c in compared if c.found != c.before)
    written = next((c for c in compared if c.found == c.after != c.before), None)
    kept = next((c for c in compared if c.found == c.before != c.after), None)
    if written is not None and kept is not None:
        raise PatchError(
            f"{written.name} holds what this patch writes, but {kept.name} what was there before: the patch lies on "
            "this model in part. Load the base again, or put back what changed a part of it."
        )
    because = (
        f"it was made on a model with patch {parent}, which is missing here, or something was written since; apply "
        "earlier patches first, and revert others."
        if parent
        else "apply earlier patches first, and revert others."
    )
    raise PatchError(f"{first.name} does not hold the weights on which this patch was made; {because}")


def check_edited(compared: Sequence[Compared]) -> None:
    """Refuse to revert a patch unless every matrix is as the patch left it.

    Raises:
        PatchError: the patch is not applied, or something was written since.
    """
    if all(c.found == c.after for c in compared):
        return
    if all(c.found == c.before for c in compared):
        raise PatchError("This patch is not applied, so there is nothing to revert.")
    first = next(c for c in compared if c.found != c.after)
    if first.found == first.before:
        raise PatchError(
            f"{first.name} holds the weights from before this patch: the patch lies on this model in part."
        )
    raise PatchError(f"{first.name} was changed after this patch was written; revert the later patch first.")


def no_originals() -> PatchError:
    """The error for a patch that was loaded from a file without originals, and no base at hand."""
    return PatchError(
        "This patch was loaded without originals, so it can't be reverted by itself: pass base=, the unedited model or "
        "its weights, or save patches with keep_originals=True."
    )


def check_original(name: str, found: int, expected: int) -> None:
    """Refuse an original whose checksum is not the one before the patch.

    Raises:
        PatchError: it is of another base.
    """
    if found != expected:
        raise PatchError(
            f"{name} of the base is not what this patch was made on; pass the weights that the model had right before "
            "this patch."
        )


def check_originals(layer: int, found: Mapping[int, Tensor], expected: Mapping[int, int]) -> None:
    """`check_original` of matrices of one layer by expert, whose checksums are read at once."""
    for expert, value in zip(found, checksums_of(list(found.values())), strict=True):
        check_original(f"Layer {layer}, expert {expert}", value, expected[expert])


def reader_of(base: Base) -> Callable[[str], Tensor]:
    """Parameters of a base by full name.

    Raises:
        PatchError: by the function, where the base lacks the parameter.
    """
    table = own_parameters(base) if isinstance(base, nn.Module) else base

    def read(name: str) -> Tensor:
        try:
            found = table[name] if isinstance(table, Mapping) else table(name)
        except KeyError:
            found = None
        if not isinstance(found, Tensor) or found.is_meta:
            raise PatchError(f"The base lacks the weights of {name}, which this patch changed.")
        return found.detach()

    return read


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    from easyedit_moe import __version__

    return {
        "easyedit_moe": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
