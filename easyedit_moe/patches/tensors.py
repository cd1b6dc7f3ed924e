"""Patches of whole tensors, for edits that are no factored update of down-projections: gradient-based ones.

Originals and written values are kept in main memory, since a GPU that trains has none to spare.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from easyedit_moe.errors import NumericalError, PatchError
from easyedit_moe.interrupts import do_all, uninterrupted
from easyedit_moe.moe.fingerprint import down_checksums, joined_fingerprint, model_fingerprint
from easyedit_moe.moe.holding import held, intact
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.wrappers import own_parameters, plain_name
from easyedit_moe.patches.checks import (
    Base,
    Compared,
    check_edited,
    check_model,
    check_not_applied,
    check_original,
    check_unedited,
    no_originals,
    reader_of,
    versions,
)
from easyedit_moe.patches.flips import check_flips, flipped, flips_between
from easyedit_moe.patches.record import ADVICE, PatchRecord, SavedRecord, check_id, read_patch
from easyedit_moe.storage.checksums import checksum
from easyedit_moe.storage.schema import FLOATS, Expected, check_tensors, content_of
from easyedit_moe.storage.tensors import write_safetensors

_FLIPS = "flips:"
"""What the names of flips begin with in a file, beside the values under their own names."""


@dataclass(frozen=True)
class TensorReport:
    """What one write did to one parameter.

    Attributes:
        name: full name of the parameter.
        rounding_loss: ``||applied - intended|| / ||intended||``; what the parameter's dtype swallowed.
        update_norm: Frobenius norm of the intended change.
        weight_norm: Frobenius norm of the parameter before; None where it was not measured.
    """

    name: str
    rounding_loss: float
    update_norm: float
    weight_norm: float | None = None

    @property
    def relative_size(self) -> float | None:
        """The norm of the change by that of the parameter before; None where that is zero or not known."""
        return self.update_norm / self.weight_norm if self.weight_norm else None


@dataclass(frozen=True, kw_only=True)
class _Saved(SavedRecord):
    """Metadata of a file."""

    without: list[str]
    before: dict[str, int]
    after: dict[str, int]
    reports: list[TensorReport]


@dataclass
class TensorPatch(PatchRecord):
    """New values of parameters, by full name, in the parameters' dtype and on the CPU.

    Attributes:
        values: what the patch writes.
        before, after: checksums of each parameter at both ends: a patch goes only onto the very weights it was made
            on, so applying it gives the same bits as the edit.
        fingerprint: of the model without the parameters that ``without`` names.
        metadata: provenance: hparams, requests, versions.
        reports: what each write did.
        originals: what the parameters held; only where the patch is applied, and in a run of patches the values of an
            earlier one where it wrote them (`easyedit_moe.patches.runs.continues_tensors`).
        without: the parameters that the fingerprint leaves out; by default those that the patch holds.
        flips: name -> compressed xor of the bits before and after; empty unless the patch was saved with originals.
    """

    values: dict[str, Tensor]
    before: dict[str, int]
    fingerprint: str
    metadata: dict[str, Any] = field(default_factory=dict)
    reports: list[TensorReport] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    without: tuple[str, ...] | None = None
    flips: dict[str, Tensor] = field(default_factory=dict)

    @property
    def applied(self) -> bool:
        """Whether this value knows what it overwrote on a model."""
        return bool(self.originals)

    @property
    def names(self) -> list[str]:
        """Full names of the parameters that the patch changes."""
        return sorted(self.values)

    @property
    def dtypes(self) -> dict[str, str]:
        """Name -> dtype of the parameter, such as "bfloat16"; checksums are of bits in it."""
        return {name: str(value.dtype).removeprefix("torch.") for name, value in self.values.items()}

    @property
    def left_out(self) -> tuple[str, ...]:
        """Parameters that the fingerprint leaves out."""
        return tuple(self.names) if self.without is None else self.without

    def content(self) -> dict[str, Any]:
        """As `PatchRecord.content`."""
        return {
            "fingerprint": self.fingerprint,
            "without": sorted(self.left_out),
            "before": dict(sorted(self.before.items())),
            "after": dict(sorted(self.after.items())),
        }

    def apply(self, model: nn.Module) -> None:
        """Write a loaded (or reverted) patch: all parameters or none.

        Raises:
            AlreadyAppliedError: the model holds this edit. PatchError: made for another model, or on weights that were
                edited since or before.
        """
        check_not_applied(self.originals)

        def applied() -> bool:
            return bool(self.originals)

        with writing_tensors(model, applied) as writer, intact(model, applied) as hold:
            hold.undo.append(self.forget)
            parameters = self._parameters(model)
            check_model(MoELayerView(model), self.fingerprint, self.left_out, self.parent)
            check_unedited(self._compared(parameters), self.parent)
            for name, value in self.values.items():
                writer.keep(name)
                _copy(parameters[name], value)
            self.originals = writer.originals

    def revert(self, model: nn.Module, base: Base | None = None) -> None:
        """Put the originals back; every parameter is then bit-equal to before the patch.

        Args:
            model: on which the patch lies.
            base: where the originals are read from, for a patch that was applied by another process and holds none:
                the unedited model, its state dict, or a function of a parameter's full name.

        Raises:
            PatchError: not applied, or the weights were changed since (revert later patches first), or the originals
                are not at hand. Nothing is changed then.
        """
        if not self.values:
            return
        with held(model):
            parameters = self._parameters(model)
            check_edited(self._compared(parameters))
            originals = self.originals or self._found_originals(parameters, base)
            with uninterrupted():
                restore_tensors(model, originals)
                self.forget()

    def restore(self, model: nn.Module) -> None:
        """Put the originals back, whatever happened to the weights since; nothing where the patch is not applied."""
        with held(model), uninterrupted():
            restore_tensors(model, self.originals)
            self.forget()

    def forget(self) -> None:
        """Not be applied any more, as the weights are those from before."""
        self.originals = {}

    def weights_copy(self, model: nn.Module) -> dict[str, Tensor]:
        """Full original tensors by full parameter name, on the parameters' devices, as EasyEdit restores them."""
        names = {plain_name(name): name for name, _ in model.named_parameters(remove_duplicate=False)}
        return {
            names[name]: original.to(model.get_parameter(names[name]).device, copy=True)
            for name, original in self.originals.items()
        }

    def save(self, path: str | Path, keep_originals: bool = False) -> None:
        """Write values, checksums and provenance to one safetensors file, atomically.

        With ``keep_originals`` the file also holds what turns the edited values into the original ones: the patch must
        then be applied, or have been loaded with it.

        Raises:
            PatchError: the originals are not at hand; no file is written. WriteError: the file can't be written.
        """
        flips = self._flips() if keep_originals else {}
        metadata = self.described("tensor patch", self.reports, self.metadata, bool(flips))
        write_safetensors(Path(path), {**self.values, **{_FLIPS + n: bits for n, bits in flips.items()}}, metadata)

    @staticmethod
    def load(path: str | Path) -> TensorPatch:
        """Read a saved patch; it holds no originals, but ``flips`` where it was saved with them.

        Raises:
            PatchError: a file that is missing, truncated or corrupt, or holds anything else than a patch of tensors.
        """
        tensors, saved = read_patch(path, "tensor patch", "patch of tensors", _Saved)
        values = {name: tensor for name, tensor in tensors.items() if not name.startswith(_FLIPS)}
        flips = {name.removeprefix(_FLIPS): bits for name, bits in tensors.items() if name.startswith(_FLIPS)}
        with content_of(Path(path), PatchError, ADVICE):
            _check_values(values, flips, saved)
            patch = TensorPatch(
                values=values,
                before=saved.before,
                after=saved.after,
                reports=saved.reports,
                without=tuple(saved.without),
                flips=flips,
                **saved.fields(),
            )
            check_id(patch, saved)
        return patch

    def _compared(self, parameters: Mapping[str, nn.Parameter]) -> list[Compared]:
        return [Compared(n, checksum(p.data), self.before[n], self.after[n]) for n, p in parameters.items()]

    def _found_originals(self, parameters: Mapping[str, nn.Parameter], base: Base | None) -> dict[str, Tensor]:
        """The originals, from a base or from the flips; checked."""
        if not self.flips and base is None:
            raise no_originals()
        read = None if base is None else reader_of(base)
        found = {}
        for name, parameter in parameters.items():
            original = flipped(parameter.data, self.flips[name]) if read is None else read(name)
            check_original(name, checksum(original), self.before[name])
            found[name] = original
        return found

    def _flips(self) -> dict[str, Tensor]:
        """The patch's flips, made from its originals where it has none yet."""
        if self.flips or not self.values:
            return self.flips
        if not self.originals:
            raise PatchError(
                "keep_originals needs a patch that is applied, or one that was loaded with its originals. Apply it "
                "to the base first."
            )
        return {name: flips_between(original, self.values[name]) for name, original in self.originals.items()}

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that the patch names; PatchError where one is missing or of another shape or dtype."""
        known = own_parameters(model)
        for name, value in self.values.items():
            parameter = known.get(name)
            if parameter is None or parameter.shape != value.shape or parameter.dtype != value.dtype:
                found = "nothing" if parameter is None else f"{tuple(parameter.shape)} of {parameter.dtype}"
                raise PatchError(
                    f"This patch holds {name} as {tuple(value.shape)} of {value.dtype}; the model has {found} there."
                )
            if parameter.is_meta:
                raise PatchError(f"{name} is offloaded (on the meta device); load the model with it on a device.")
        return {name: known[name] for name in self.values}


def _check_values(values: Mapping[str, Tensor], flips: Mapping[str, Tensor], saved: _Saved) -> None:
    """ValueError unless these are the tensors that the metadata of a file speak of."""
    if not values.keys() == saved.before.keys() == saved.after.keys():
        raise ValueError("its tensors are not those that its checksums are of")
    if bool(flips) != bool(saved.originals) or (flips and flips.keys() != values.keys()):
        raise ValueError("it holds originals of other tensors than it changes")
    kinds = {f"{name}": Expected(tuple(value.shape), FLOATS) for name, value in values.items()}
    check_tensors(values, kinds)
    check_flips(flips)
    damaged = [name for name, value in values.items() if checksum(value) != saved.after[name]]
    if damaged:
        raise ValueError(f"{damaged[0]} has another checksum")


class TensorWriter:
    """Remembers parameters before they are changed, and writes their final values; made by `writing_tensors`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = own_parameters(model)
        self.originals: dict[str, Tensor] = {}
        self.reports: list[TensorReport] = []

        self._kept: dict[nn.Parameter, str] = {}

    def keep(self, name: str) -> str:
        """Remember a parameter as it is now, to be called before anything changes it; the name it is kept by.

        A parameter that several modules share is kept once, by the name that came first.
        """
        known = self._kept.setdefault(self.parameters[plain_name(name)], plain_name(name))
        if known not in self.originals:
            self.originals[known] = self.parameters[known].detach().to("cpu", copy=True)
        return known

    def write(self, name: str, value: Tensor) -> TensorReport:
        """Set a parameter to ``value`` (float32 or better), rounded once to its dtype.

        Raises:
            NumericalError: a value that is not finite, or not after rounding.
        """
        name = self.keep(name)
        parameter, original = self.parameters[name], self.originals[name]
        rounded = value.to(parameter.dtype)
        if not torch.isfinite(rounded).all():
            raise NumericalError(
                f"{name} would become NaN or infinite in {parameter.dtype}; nothing was kept of this edit. Lower the "
                "learning rate, or load the model in bfloat16 or float32."
            )
        before = original.to(value.device, value.dtype)
        norm = float((value - before).norm())
        lost = float((rounded.to(value.dtype) - value).norm())
        _copy(parameter, rounded)
        self.reports.append(TensorReport(name, lost / norm if norm else 0.0, norm, float(before.norm())))
        return self.reports[-1]

    def finish(self, metadata: Mapping[str, Any]) -> TensorPatch:
        """The patch of all remembered parameters that are no longer what they were."""
        provenance = {**metadata, "versions": versions()}
        json.dumps(provenance)
        values = {name: self.parameters[name].detach().to("cpu", copy=True) for name in self.originals}
        before = {name: checksum(original) for name, original in self.originals.items()}
        after = {name: checksum(value) for name, value in values.items()}
        changed = [name for name in values if before[name] != after[name]]
        view = MoELayerView(self.model)
        originals = {name: self.originals[name] for name in changed}
        instead = {self.parameters[name]: original for name, original in originals.items()}
        return TensorPatch(
            values={name: values[name] for name in changed},
            before={name: before[name] for name in changed},
            fingerprint=model_fingerprint(view, changed),
            metadata=provenance,
            reports=self.reports,
            originals=originals,
            after={name: after[name] for name in changed},
            base=joined_fingerprint(model_fingerprint(view, instead=instead), down_checksums(view, instead)),
        )


@contextmanager
def writing_tensors(model: nn.Module, kept: Callable[[], bool] | None = None) -> Iterator[TensorWriter]:
    """All changes inside to remembered parameters are kept, or, if anything raises, none: bit-equal to before.

    So it is if anything raises later in an `intact` scope around this one. ``kept`` is that scope's, for this one.
    """
    writer = TensorWriter(model)
    with intact(model, kept) as hold:
        hold.undo.append(lambda: restore_tensors(model, writer.originals))
        yield writer


def restore_tensors(model: nn.Module, originals: Mapping[str, Tensor]) -> None:
    """Copy originals back, bit for bit.

    Raises:
        PatchError: the model lacks one of them, or has it offloaded or in another shape; nothing is changed.
    """
    parameters = own_parameters(model) if originals else {}
    for name, original in originals.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.is_meta or parameter.shape != original.shape:
            found = "nothing" if parameter is None else f"{tuple(parameter.shape)} on {parameter.device}"
            raise PatchError(
                f"The original of {name} is {tuple(original.shape)}; the model has {found} there, so it can't be put "
                "back."
            )
    do_all(partial(_copy, parameters[name], original) for name, original in originals.items())


def _copy(parameter: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        parameter.data.copy_(value)
