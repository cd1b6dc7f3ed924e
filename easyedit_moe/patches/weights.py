"""Weight patches: an edit as a value that can be written, reverted bit-exactly, saved and loaded."""

from __future__ import annotations

import json
import warnings as warning
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from easyedit_moe.algebra.core import FactoredCore
from easyedit_moe.algebra.core_update import CoreUpdate, Update
from easyedit_moe.errors import EditingWarning, NumericalError, PatchError, offloaded
from easyedit_moe.hparams.sites import EXPERTS, site_entry
from easyedit_moe.interrupts import do_all, uninterrupted
from easyedit_moe.moe.experts import expert_matrix
from easyedit_moe.moe.fingerprint import down_checksums, joined_fingerprint
from easyedit_moe.moe.holding import held, intact
from easyedit_moe.moe.layers import MoELayer, MoELayerView
from easyedit_moe.patches.checks import (
    Base,
    Compared,
    check_edited,
    check_model,
    check_not_applied,
    check_originals,
    check_unedited,
    no_originals,
    reader_of,
    versions,
)
from easyedit_moe.patches.flips import flipped, flips_between
from easyedit_moe.patches.groups import add_groups, groups_of, originals_of
from easyedit_moe.patches.record import ADVICE, PatchRecord, check_id, read_patch
from easyedit_moe.patches.runs import overwritten, put_back, replayed, run_of
from easyedit_moe.patches.steps import steps_of, tensors_of
from easyedit_moe.patches.stored import (
    FLIPS,
    Checksums,
    SavedWeights,
    StoredExperts,
    WriteReport,
    flips_of,
)
from easyedit_moe.storage.checksums import checksum, checksums_of
from easyedit_moe.storage.schema import content_of
from easyedit_moe.storage.tensors import write_safetensors


@dataclass
class WeightPatch(PatchRecord):
    """Factored updates in the order in which they were written, and the originals of what they overwrote.

    Attributes:
        steps: layer and update of each write, float32: factors, or a core (`easyedit_moe.algebra.core_update`). The
            layer's own part of a core is not copied: the cores of a run share it with what was prepared for the model.
        fingerprint: of the model, edits left out.
        metadata: provenance: hparams, requests, versions.
        reports: what each write did; of the last application where there was one.
        originals: layer -> expert -> ``[d, h]`` in the parameter's dtype; only where the patch is applied, and in a run
            of patches only of matrices that no earlier one changed.
        written: checksums of what lies on the model; only where the patch is applied. They differ from ``after`` where
            this machine rounds otherwise than the one that made the patch.
        before, after: layer -> expert -> checksum of every down-projection that is written, at both ends.
        stored: layer -> where its down-projections lie in the model.
        site: which down-projections these are, one of `easyedit_moe.hparams.sites.SITES`.
        flips: layer -> expert -> compressed xor of the bits before and after (`easyedit_moe.patches.flips`); empty
            unless the patch was saved with originals.
        earlier: the patch before it in a run that shares its originals (`easyedit_moe.patches.runs`).
        plain: no matrix that the run writes is that of two layers or experts.
    """

    steps: list[tuple[int, Update]]
    fingerprint: str
    metadata: dict[str, Any] = field(default_factory=dict)
    reports: list[WriteReport] = field(default_factory=list)
    originals: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    written: Checksums = field(default_factory=dict)
    before: Checksums = field(default_factory=dict)
    after: Checksums = field(default_factory=dict)
    stored: dict[int, StoredExperts] = field(default_factory=dict)
    flips: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    site: str = EXPERTS
    earlier: WeightPatch | None = field(default=None, repr=False, compare=False)
    plain: bool = field(default=True, repr=False, compare=False)
    _model: weakref.ref[nn.Module] | None = field(default=None, repr=False, compare=False)

    @property
    def applied(self) -> bool:
        """Whether this value knows what it overwrote on a model, by itself or from the patches before it."""
        return any(part.originals for part in run_of(self))

    @property
    def layers(self) -> list[int]:
        """Layers that the patch touches."""
        return sorted({layer for layer, _ in self.steps})

    @property
    def names(self) -> dict[int, str]:
        """Layer -> full name of its experts module."""
        return {layer: stored.name for layer, stored in self.stored.items()}

    @property
    def dtypes(self) -> dict[int, str]:
        """Layer -> dtype of its down-projections, such as "bfloat16"; checksums are of bits in it."""
        return {layer: stored.dtype for layer, stored in self.stored.items()}

    def content(self) -> dict[str, Any]:
        """As `PatchRecord.content`."""
        return {
            "fingerprint": self.fingerprint,
            "layers": [layer for layer, _ in self.steps],
            "stored": {str(layer): vars(stored) for layer, stored in sorted(self.stored.items())},
            "before": _as_json(self.before),
            "after": _as_json(self.after),
            **site_entry(self.site),
        }

    def apply(self, model: nn.Module) -> list[WriteReport]:
        """Write a loaded (or reverted) patch: all layers or none.

        With ``flips`` the bits are those that the patch was made with, on any machine. Without, the arithmetic is that
        of the edit; where this machine rounds it otherwise, the result is kept, and an EditingWarning says so.

        Raises:
            AlreadyAppliedError: the model holds this edit. PatchError: made for another model, or on weights that are
                not there. NumericalError: non-finite result. LayerError, LayoutError: the model lacks the layers, or
                has them offloaded.
        """
        check_not_applied(self.applied)
        view = self._view(model)

        def applied() -> bool:
            return bool(self.originals)

        with writing(view, applied) as writer, intact(model, applied) as hold:
            hold.undo.append(self.forget)
            check_model(view, self.fingerprint, parent=self.parent)
            for layer, update in self.steps:
                self.check_fits(view, layer, update)
            check_unedited(self._compared(view), self.parent)
            if self.flips:
                self._turn(writer)
            else:
                for layer, update in self.steps:
                    writer.write(layer, update)
            written, reports = writer.checksums(), self.reports if self.flips else writer.reports
            if written != self.after:
                warning.warn(f"{self._why_rounded()} It can be reverted.", EditingWarning, stacklevel=2)
            self.reports, self.written, self._model, self.originals = (
                reports, written, weakref.ref(model), writer.originals,
            )  # fmt: skip
        return self.reports

    def _why_rounded(self) -> str:
        """Why what was written differs in its last bits from what the edit wrote."""
        if self.metadata.get("folded"):
            return "The patch is folded, so some weights differ in their last bits from what its steps write."
        return (
            "This machine rounds the patch otherwise than the one that made it, so some weights differ in their last "
            "bit from the original edit. A patch saved with keep_originals=True is exact everywhere."
        )

    def revert(self, model: nn.Module, base: Base | None = None) -> None:
        """Put the originals back; every down-projection is then bit-equal to before the patch.

        Args:
            model: on which the patch lies.
            base: where the originals are read from, for a patch that was applied by another process and holds none:
                the unedited model, its state dict, or a function of a parameter's full name.

        Raises:
            PatchError: not applied, or the weights were changed since (revert later patches first), or the originals
                are not at hand. Nothing is changed then.
        """
        view = self._view(model)
        with held(model):
            if self.applied:
                check_edited(self._compared(view, self.written))
                originals = overwritten(self, view)
            else:
                if not self.after:
                    raise PatchError("This patch is not applied, so there is nothing to revert.")
                compared = self._compared(view)
                if base is None or self.flips or all(c.found in (c.before, c.after) for c in compared):
                    check_edited(compared)
                    originals = self._found_originals(view, base)
                else:  # as where another machine rounds otherwise, or steps were folded
                    originals = self._found_originals(view, base)
                    check_edited(self._compared(view, self._written_on(view, originals)))
            with uninterrupted():
                restore(view, originals)
                self.forget()

    def restore(self, model: nn.Module) -> None:
        """Put the originals back, whatever happened to the weights since; nothing where the patch is not applied."""
        with held(model), uninterrupted():
            view = self._view(model)
            restore(view, overwritten(self, view) if self.applied else {})
            self.forget()

    def forget(self) -> None:
        """Not be applied any more, as the weights are those from before."""
        self.originals, self.written, self.earlier = {}, {}, None

    def weights_copy(self, model: nn.Module) -> dict[str, Tensor]:
        """Full original tensors by full parameter name, as EasyEdit restores them."""
        view, full = self._view(model), {}
        for layer, experts in (overwritten(self, view) if self.applied else {}).items():
            moe = view.layers[layer]
            for expert, original in experts.items():
                name, parameter = moe.experts.parameters_of(expert)
                name = f"{moe.experts_name}.{name}"
                if name not in full:
                    full[name] = parameter.detach().clone()
                put_back(expert_matrix(full[name], expert, moe.experts.layout), original)
        return full

    def save(self, path: str | Path, keep_originals: bool = False) -> None:
        """Write steps, checksums and provenance to one safetensors file, atomically.

        A core is written as it is, or by its factors for every expert, whichever is smaller; both apply the same bits.
        With ``keep_originals`` the file also holds what turns the edited weights into the original ones and back, bit
        for bit: the patch must then be applied, or have been loaded with it.

        Raises:
            PatchError: the originals are not at hand; no file is written. WriteError: the file can't be written.
        """
        flips = self._flips() if keep_originals else {}
        tensors = tensors_of([update for _, update in self.steps])
        for layer, experts in flips.items():
            tensors.update({f"{FLIPS}{layer}.{expert}": bits for expert, bits in experts.items()})
        write_safetensors(Path(path), tensors, self.described("patch", self.reports, self.metadata, bool(flips)))

    @staticmethod
    def load(path: str | Path) -> WeightPatch:
        """Read a saved patch; it holds no originals, but ``flips`` where it was saved with them.

        Raises:
            PatchError: a file that is missing, truncated or corrupt, or holds anything else than a patch.
        """
        tensors, saved = read_patch(path, "patch", "patch", SavedWeights)
        with content_of(Path(path), PatchError, ADVICE):
            patch = WeightPatch(
                steps=steps_of(tensors, saved),
                reports=saved.reports,
                before=saved.before,
                after=saved.after,
                stored=saved.stored,
                flips=flips_of(tensors, saved),
                site=saved.site,
                **saved.fields(),
            )
            check_id(patch, saved)
        return patch

    @staticmethod
    def concat(patches: list[WeightPatch]) -> WeightPatch:
        """`easyedit_moe.patches.merging.merge`, for patches of this kind; of applied ones it is applied, too.

        Raises:
            PatchError: see there.
        """
        from easyedit_moe.patches.merging import merge_weights

        return merge_weights(patches)

    def matrices(self) -> Iterator[tuple[int, int]]:
        """Layer and expert of every down-projection that the patch writes."""
        for layer, experts in self.before.items():
            for expert in experts:
                yield layer, expert

    def _view(self, model: nn.Module) -> MoELayerView:
        return MoELayerView(model, site=self.site)

    def _compared(self, view: MoELayerView, after: Checksums | None = None) -> list[Compared]:
        """All matrices of the patch on a model, ``after`` being those of the application that is asked about."""
        after = self.after if after is None else after
        found = {
            layer: _checked({expert: _matrix(view, layer, expert) for expert in experts})
            for layer, experts in self.before.items()
        }
        return [
            Compared(
                f"Layer {layer}, expert {expert}",
                found[layer][expert],
                self.before[layer][expert],
                after[layer][expert],
            )
            for layer, expert in self.matrices()
        ]

    def _found_originals(self, view: MoELayerView, base: Base | None) -> dict[int, dict[int, Tensor]]:
        """The originals, from the flips or from a base (of the run, where the patch is part of one); checked."""
        if not self.flips and base is None:
            raise no_originals()
        if self.earlier is not None and base is not None:
            return overwritten(self, view, self._of_base(base))
        if base is not None:
            found = self._of_base(base)
        else:
            found = {
                layer: {e: flipped(_matrix(view, layer, e), bits) for e, bits in experts.items()}
                for layer, experts in self.flips.items()
            }
        for layer, experts in self.before.items():
            check_originals(layer, {expert: found[layer][expert] for expert in experts}, experts)
        return found

    def _written_on(self, view: MoELayerView, originals: Mapping[int, dict[int, Tensor]]) -> Checksums:
        """Checksums of what the steps make of the originals on this machine."""
        written = {}
        for layer, experts in originals.items():
            steps = [update for number, update in self.steps if number == layer]
            written[layer] = _checked(replayed(view, layer, experts, steps))
        return written

    def _of_base(self, base: Base) -> dict[int, dict[int, Tensor]]:
        """Every matrix of the patch, and of those before it in its run, as a base has it."""
        read = None if isinstance(base, nn.Module) else reader_of(base)
        source = self._view(base) if isinstance(base, nn.Module) else None
        found: dict[int, dict[int, Tensor]] = {}
        for part in reversed(list(run_of(self))):
            for layer, expert in part.matrices():
                if expert in found.get(layer, {}):
                    continue
                if source is not None:
                    original = _matrix(source, layer, expert)
                elif read is not None:
                    stored = part.stored[layer]
                    original = stored.matrix(read(stored.parameter_of(expert)), expert)
                found.setdefault(layer, {})[expert] = original
        return found

    def _turn(self, writer: PatchWriter) -> None:
        """Apply by turning bits."""
        for layer, experts in self.before.items():
            writer.keep(layer, list(experts))
            for expert, original in writer.originals[layer].items():
                value = flipped(original, self.flips[layer][expert])
                if checksum(value) != self.after[layer][expert]:
                    raise PatchError(f"Layer {layer}, expert {expert}: the originals in this patch are damaged.")
                writer.view.layers[layer].experts.read(expert).copy_(value)

    def _flips(self) -> dict[int, dict[int, Tensor]]:
        """The patch's flips, made from the model it lies on where it has none yet."""
        if self.flips or not self.before:
            return self.flips
        model = self._model() if self._model is not None else None
        if not self.applied or model is None:
            raise PatchError(
                "keep_originals needs a patch that is applied, or one that was loaded with its originals. Apply it "
                "to the base first."
            )
        view = self._view(model)
        check_edited(self._compared(view, self.written))
        if self.written != self.after:
            raise PatchError(
                "This machine rounds the patch otherwise than the one that made it, so its originals are not those of "
                "the patch. Make the edit here, or save it with keep_originals=True where it was made."
            )
        return {
            layer: {e: flips_between(original, _matrix(view, layer, e)) for e, original in experts.items()}
            for layer, experts in overwritten(self, view).items()
        }

    @staticmethod
    def check_fits(view: MoELayerView, layer: int, update: Update) -> None:
        """Refuse an update of other experts than a layer has; PatchError."""
        moe = view.require([layer])[0]
        layout = moe.experts.layout
        d, h = update.d_model, update.d_hidden
        if (d, h) != (layout.d_model, layout.d_hidden) or max(update.experts) >= layout.num_experts:
            raise PatchError(
                f"Layer {layer} has {layout.num_experts} experts of {layout.d_model} x {layout.d_hidden}; "
                f"the patch holds updates of {d} x {h} up to expert {max(update.experts)}."
            )


class PatchWriter:
    """Writes updates and remembers what they overwrite; made by `writing`."""

    def __init__(self, view: MoELayerView) -> None:
        self.view = view
        self.originals: dict[int, dict[int, Tensor]] = {}
        self.steps: list[tuple[int, Update]] = []
        self.reports: list[WriteReport] = []
        self._last: tuple[Any, Any] = (None, None)
        self._places: dict[tuple[torch.device, int], tuple[int, int]] = {}

    def write(self, layer: int, update: Update) -> WriteReport:
        """Add ``update`` to one layer: in float32, rounded once to the parameter's dtype.

        One grouped product per run of neighbouring experts, in tiles that stay in a CPU's cache or fill a GPU; beside
        the originals no second copy of the weights exists.

        Raises:
            NumericalError: the update, or a weight it leads to, is not finite.
        """
        moe = self.view.layers[layer]
        # On the weights' device, so that a patch read from a file is multiplied out as when it was made.
        device = next(iter(moe.experts.parameters()))[1].device
        update = self._converted(update, device)
        if not update.is_finite():
            raise NumericalError(f"The update of layer {layer} holds NaN or infinity; nothing was kept of this edit.")
        lost = 0.0
        updates: dict[int, float] = {}
        weights: dict[int, float] = {}
        self.keep(layer, update.experts)
        with torch.no_grad():
            for added in add_groups(moe, groups_of(moe, update)):
                updates.update(zip(added.group.experts, added.updates, strict=True))
                weights.update(zip(added.group.experts, added.weights, strict=True))
                lost += added.lost
        self.steps.append((layer, update))
        total = sum(updates.values())
        loss = (lost / total) ** 0.5 if total else 0.0
        self.reports.append(WriteReport(layer, loss, total**0.5, len(update.experts), updates, weights))
        return self.reports[-1]

    def _converted(self, update: Update, device: torch.device) -> Update:
        """In float32 on a device; where a solution is spread over layers, they share one copy of all but its left
        factor.
        """
        part: Any = update.core if isinstance(update, CoreUpdate) else update
        shared = None if isinstance(part, Tensor) else part.inner if isinstance(part, FactoredCore) else part.right
        known, last = self._last
        if last is not None and known is shared and last.left.device == device:
            part = replace(last, left=part.left.to(device=device, dtype=torch.float32))
        else:
            part = part.to(device=device, dtype=torch.float32)
            self._last = (shared, None if shared is None else part)
        return replace(update, core=part) if isinstance(update, CoreUpdate) else part

    def keep(self, layer: int, experts: Sequence[int]) -> None:
        """Remember experts as they are now, to be called before they change; a matrix that several share, once."""
        moe, new = self.view.layers[layer], []
        for expert in experts:
            if self._places.setdefault(_place(moe, expert), (layer, expert)) == (layer, expert):
                new.append(expert)
        new = [expert for expert in new if expert not in self.originals.get(layer, {})]
        with torch.no_grad():
            self.originals.setdefault(layer, {}).update(originals_of(moe, new))

    def checksums(self) -> Checksums:
        """Checksums of all written experts, by which a revert sees later changes."""
        return {
            layer: _checked({expert: _matrix(self.view, layer, expert) for expert in experts})
            for layer, experts in self.originals.items()
        }

    def finish(self, metadata: Mapping[str, Any], fingerprint: str) -> WeightPatch:
        """The patch of everything written so far."""
        provenance = {**metadata, "versions": versions()}
        json.dumps(provenance)
        before = {layer: _checked(experts) for layer, experts in self.originals.items()}
        after = self.checksums()
        return WeightPatch(
            steps=self.steps,
            fingerprint=fingerprint,
            metadata=provenance,
            reports=self.reports,
            originals=self.originals,
            written=after,
            before=before,
            after=after,
            stored={layer: StoredExperts.of(self.view.layers[layer]) for layer in self.originals},
            base=joined_fingerprint(fingerprint, self._state(before)),
            site=self.view.site,
            _model=weakref.ref(self.view.model),
        )

    def _state(self, before: Checksums) -> Checksums:
        """Checksums of all down-projections as they were before the first write."""
        state = down_checksums(self.view)
        for layer, experts in state.items():
            for expert in experts:
                kept = self._places.get(_place(self.view.layers[layer], expert))
                if kept is not None:
                    experts[expert] = before[kept[0]][kept[1]]
        return state


@contextmanager
def writing(view: MoELayerView, kept: Callable[[], bool] | None = None) -> Iterator[PatchWriter]:
    """All writes inside are kept, or, if anything raises, none: the model is then bit-equal to before.

    So it is if anything raises later in an `intact` scope around this one. ``kept`` is that scope's, for this one.
    """
    writer = PatchWriter(view)
    with intact(view.model, kept) as hold:
        hold.undo.append(lambda: restore(view, writer.originals))
        yield writer


def restore(view: MoELayerView, originals: Mapping[int, Mapping[int, Tensor]]) -> None:
    """Copy originals back, bit for bit.

    Raises:
        PatchError: the model lacks one of the matrices, or has it offloaded or in another shape; nothing is changed.
    """
    pairs = []
    for layer, experts in originals.items():
        for expert, original in experts.items():
            weight = _matrix(view, layer, expert)
            if weight.shape != original.shape or weight.dtype != original.dtype:
                raise PatchError(
                    f"Layer {layer}, expert {expert} is {tuple(weight.shape)} of {weight.dtype}; the original is "
                    f"{tuple(original.shape)} of {original.dtype}."
                )
            pairs.append((weight, original))
    with torch.no_grad():
        do_all(partial(put_back, weight, original) for weight, original in pairs)


def _matrix(view: MoELayerView, layer: int, expert: int) -> Tensor:
    """``W_j [d, h]`` of a model, a view on the parameter; PatchError where it is not there to be read or written."""
    moe = view.layers.get(layer)
    if moe is None or expert >= moe.experts.layout.num_experts:
        raise PatchError(f"This model lacks the experts that the patch wrote in layer {layer}.")
    weight = moe.experts.read(expert)
    if weight.is_meta:
        raise PatchError(str(offloaded(moe.experts_name)))
    return weight


def _checked(weights: Mapping[int, Tensor]) -> dict[int, int]:
    """Checksums of a layer's matrices by expert."""
    return dict(zip(weights, checksums_of(list(weights.values())), strict=True))


def _place(moe: MoELayer, expert: int) -> tuple[torch.device, int]:
    """Where an expert's matrix lies in memory: the same for layers or experts that share it."""
    weight = moe.experts.read(expert)
    return weight.device, weight.data_ptr()


def _as_json(checksums: Checksums) -> dict[str, dict[str, int]]:
    return {str(n): {str(e): value for e, value in experts.items()} for n, experts in checksums.items()}
