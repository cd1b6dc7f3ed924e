"""Patches of whole tensors, for edits that are no factored update of down-projections: gradient-based ones.

Originals and written values are kept in main memory, since a GPU that trains has none to spare.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from easyedit_moe.errors import NumericalError, PatchError
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.checks import SCHEMA, check_model, check_not_applied, read_patch, versions
from easyedit_moe.storage.checksums import checksum
from easyedit_moe.storage.tensors import write_safetensors


@dataclass(frozen=True)
class TensorReport:
    """What one write did to one parameter.

    Attributes:
        name: full name of the parameter.
        rounding_loss: ``||applied - intended|| / ||intended||``; what the parameter's dtype swallowed.
        update_norm: Frobenius norm of the intended change.
    """

    name: str
    rounding_loss: float
    update_norm: float


@dataclass
class TensorPatch:
    """New values of parameters, by full name, in the parameters' dtype and on the CPU.

    ``originals`` exist only where the patch is applied. ``before`` and ``after`` are checksums of each parameter at
    both ends: a patch goes only onto the very weights it was made on, so applying it gives the same bits as the edit.
    ``fingerprint`` is that of the model without the parameters that the patch holds.
    """

    values: dict[str, Tensor]
    before: dict[str, int]
    fingerprint: str
    metadata: dict[str, Any] = field(default_factory=dict)
    reports: list[TensorReport] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Full names of the parameters that the patch changes."""
        return sorted(self.values)

    def apply(self, model: nn.Module) -> None:
        """Write a loaded (or reverted) patch: all parameters or none.

        Raises:
            PatchError: already applied, made for another model, or on weights that were edited since or before.
        """
        check_not_applied(self.originals)
        parameters = self._parameters(model)
        check_model(MoELayerView(model), self.fingerprint, self.values)
        for name, parameter in parameters.items():
            if checksum(parameter.data) != self.before[name]:
                raise PatchError(
                    f"{name} does not hold the weights on which this patch was made; apply earlier patches first, and "
                    "revert others."
                )
        with writing_tensors(model) as writer:
            for name, value in self.values.items():
                writer.keep(name)
                _copy(parameters[name], value)
            self.originals = writer.originals

    def revert(self, model: nn.Module) -> None:
        """Put the originals back; every parameter is then bit-equal to before the patch.

        Raises:
            PatchError: not applied in this process, or the weights were changed since (revert later patches first).
        """
        if not self.originals and self.values:
            raise PatchError("This patch is not applied, so there is nothing to revert.")
        for name, parameter in self._parameters(model).items():
            if checksum(parameter.data) != self.after[name]:
                raise PatchError(f"{name} was changed after this patch was written; revert the later patch first.")
        self.restore(model)

    def restore(self, model: nn.Module) -> None:
        """Put the originals back, whatever happened to the weights since; nothing where the patch is not applied."""
        restore_tensors(model, self.originals)
        self.originals = {}

    def weights_copy(self, model: nn.Module) -> dict[str, Tensor]:
        """Full original tensors by full parameter name, on the parameters' devices, as EasyEdit restores them."""
        return {
            name: original.to(model.get_parameter(name).device, copy=True) for name, original in self.originals.items()
        }

    def save(self, path: str | Path) -> None:
        """Write values, checksums and provenance to one safetensors file, atomically."""
        metadata = {
            "schema": SCHEMA,
            "kind": "tensor patch",
            "fingerprint": self.fingerprint,
            "before": self.before,
            "after": self.after,
            "provenance": self.metadata,
        }
        write_safetensors(Path(path), self.values, metadata)

    @staticmethod
    def load(path: str | Path) -> TensorPatch:
        """Read a saved patch; it is not applied yet.

        Raises:
            PatchError: missing, truncated or corrupt file, or not a patch of tensors.
        """
        values, metadata = read_patch(path, "tensor patch", "patch of tensors")
        before, after = metadata.get("before", {}), metadata.get("after", {})
        damaged = [n for n in {*values, *before, *after} if n not in values or checksum(values[n]) != after.get(n)]
        if damaged or before.keys() != after.keys():
            raise PatchError(f"{path} is damaged: {', '.join(sorted(damaged)) or 'checksums'}; save the patch anew.")
        return TensorPatch(values, before, metadata["fingerprint"], metadata["provenance"], after=after)

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that the patch names; PatchError where one is missing or of another shape or dtype."""
        known = dict(model.named_parameters())
        for name, value in self.values.items():
            parameter = known.get(name)
            if parameter is None or parameter.shape != value.shape or parameter.dtype != value.dtype:
                found = "nothing" if parameter is None else f"{tuple(parameter.shape)} of {parameter.dtype}"
                raise PatchError(
                    f"This patch holds {name} as {tuple(value.shape)} of {value.dtype}; the model has {found} there."
                )
        return {name: known[name] for name in self.values}


class TensorWriter:
    """Remembers parameters before they are changed, and writes their final values; made by `writing_tensors`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.originals: dict[str, Tensor] = {}
        self.reports: list[TensorReport] = []

    def keep(self, name: str) -> None:
        """Remember a parameter as it is now; to be called before anything changes it."""
        if name not in self.originals:
            self.originals[name] = self.model.get_parameter(name).detach().to("cpu", copy=True)

    def write(self, name: str, value: Tensor) -> TensorReport:
        """Set a parameter to ``value`` (float32 or better), rounded once to its dtype.

        Raises:
            NumericalError: a value that is not finite, or not after rounding.
        """
        self.keep(name)
        parameter, original = self.model.get_parameter(name), self.originals[name]
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
        self.reports.append(TensorReport(name, lost / norm if norm else 0.0, norm))
        return self.reports[-1]

    def finish(self, metadata: Mapping[str, Any]) -> TensorPatch:
        """The patch of all remembered parameters that are no longer what they were."""
        provenance = {**metadata, "versions": versions()}
        json.dumps(provenance)
        values = {name: self.model.get_parameter(name).detach().to("cpu", copy=True) for name in self.originals}
        before = {name: checksum(original) for name, original in self.originals.items()}
        after = {name: checksum(value) for name, value in values.items()}
        changed = [name for name in values if before[name] != after[name]]
        return TensorPatch(
            {name: values[name] for name in changed},
            {name: before[name] for name in changed},
            model_fingerprint(MoELayerView(self.model), changed),
            provenance,
            self.reports,
            {name: self.originals[name] for name in changed},
            {name: after[name] for name in changed},
        )


@contextmanager
def writing_tensors(model: nn.Module) -> Iterator[TensorWriter]:
    """All changes inside to remembered parameters are kept, or, if anything raises, none: bit-equal to before."""
    writer = TensorWriter(model)
    try:
        yield writer
    except BaseException:
        restore_tensors(model, writer.originals)
        raise


def restore_tensors(model: nn.Module, originals: Mapping[str, Tensor]) -> None:
    """Copy originals back, bit for bit."""
    for name, original in originals.items():
        _copy(model.get_parameter(name), original)


def _copy(parameter: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        parameter.data.copy_(value)
