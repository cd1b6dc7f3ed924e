"""Weight patches: an edit as a value that can be written, reverted bit-exactly, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from easyedit_moe.algebra.routed_keys import FactoredUpdate
from easyedit_moe.errors import NumericalError, PatchError
from easyedit_moe.moe.layers import MoELayer, MoELayerView
from easyedit_moe.patches.checks import SCHEMA, check_model, check_not_applied, read_patch, versions
from easyedit_moe.storage.checksums import checksum
from easyedit_moe.storage.tensors import write_safetensors


@dataclass(frozen=True)
class WriteReport:
    """What one write did to one layer.

    Attributes:
        layer: index of the layer.
        rounding_loss: ``||applied - intended|| / ||intended||`` over the layer; what the parameter's dtype swallowed.
        update_norm: Frobenius norm of the intended update.
        experts: number of experts written.
    """

    layer: int
    rounding_loss: float
    update_norm: float
    experts: int


@dataclass
class WeightPatch:
    """Factored updates in the order in which they were written, and the originals of what they overwrote.

    ``steps`` hold float32 factors. ``originals`` (layer -> expert -> ``[d, h]`` in the parameter's dtype) exist only
    in the process that wrote the patch; a loaded patch gets them when it is applied.
    """

    steps: list[tuple[int, FactoredUpdate]]
    fingerprint: str
    metadata: dict[str, Any] = field(default_factory=dict)
    reports: list[WriteReport] = field(default_factory=list)
    originals: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    written: dict[int, dict[int, int]] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        """Layers that the patch touches."""
        return sorted({layer for layer, _ in self.steps})

    def apply(self, model: nn.Module) -> list[WriteReport]:
        """Write a loaded (or reverted) patch: all layers or none; the same arithmetic as when it was made.

        Raises:
            PatchError: already applied, or made for another model. NumericalError: non-finite result.
        """
        check_not_applied(self.originals)
        view = MoELayerView(model)
        check_model(view, self.fingerprint)
        with writing(view) as writer:
            for layer, update in self.steps:
                self._check_fits(view, layer, update)
                writer.write(layer, update)
            self.originals, self.written, self.reports = writer.originals, writer.checksums(), writer.reports
        return self.reports

    def revert(self, model: nn.Module) -> None:
        """Put the originals back; every down-projection is then bit-equal to before the patch.

        Raises:
            PatchError: not applied in this process, or the weights were changed since (revert later patches first).
        """
        if not self.originals:
            raise PatchError("This patch is not applied, so there is nothing to revert.")
        view = MoELayerView(model)
        for layer, experts in self.written.items():
            moe = view.layers.get(layer)
            if moe is None or max(experts, default=0) >= moe.experts.layout.num_experts:
                raise PatchError(f"This model lacks the experts that the patch wrote in layer {layer}.")
            for expert, expected in experts.items():
                if checksum(moe.experts.read(expert)) != expected:
                    raise PatchError(
                        f"Layer {layer}, expert {expert} was changed after this patch was written; revert the later "
                        "patch first."
                    )
        restore(view, self.originals)
        self.originals, self.written = {}, {}

    def restore(self, model: nn.Module) -> None:
        """Put the originals back, whatever happened to the weights since; nothing where the patch is not applied."""
        restore(MoELayerView(model), self.originals)
        self.originals, self.written = {}, {}

    def weights_copy(self, model: nn.Module) -> dict[str, Tensor]:
        """Full original tensors by full parameter name, as EasyEdit restores them."""
        view, full = MoELayerView(model), {}
        for layer, experts in self.originals.items():
            moe = view.layers[layer]
            for expert, original in experts.items():
                name, parameter = moe.experts.parameters_of(expert)
                name = f"{moe.experts_name}.{name}"
                if name not in full:
                    full[name] = parameter.detach().clone()
                target = full[name] if parameter.dim() == 2 else full[name][expert]
                target.copy_(original.T if moe.experts.layout.transposed else original)
        return full

    def save(self, path: str | Path) -> None:
        """Write factors and provenance to one safetensors file, atomically."""
        tensors: dict[str, Tensor] = {}
        for i, (_, update) in enumerate(self.steps):
            tensors[f"{i}.left"] = update.left.clone()  # two steps may share it, which safetensors refuses
            tensors[f"{i}.experts"] = torch.tensor(update.experts)
            tensors[f"{i}.sizes"] = torch.tensor([len(c) for c in update.columns])
            tensors[f"{i}.columns"] = torch.cat(update.columns)
            tensors[f"{i}.right"] = torch.cat(update.right, dim=1)
        metadata = {
            "schema": SCHEMA,
            "kind": "patch",
            "fingerprint": self.fingerprint,
            "layers": [layer for layer, _ in self.steps],
            "provenance": self.metadata,
        }
        write_safetensors(Path(path), tensors, metadata)

    @staticmethod
    def load(path: str | Path) -> WeightPatch:
        """Read a saved patch; it is not applied yet.

        Raises:
            PatchError: missing, truncated or corrupt file, or not a patch.
        """
        tensors, metadata = read_patch(path, "patch", "patch")
        try:
            steps = [(int(layer), _loaded_update(tensors, i)) for i, layer in enumerate(metadata["layers"])]
            return WeightPatch(steps, metadata["fingerprint"], metadata["provenance"])
        except KeyError as error:
            raise PatchError(f"{path} is incomplete: it lacks {error}; save the patch anew.") from error

    @staticmethod
    def concat(patches: list[WeightPatch]) -> WeightPatch:
        """One patch for several that were written one after the other; reverting it undoes all of them.

        Raises:
            PatchError: no patch, patches of different models, or one that is not applied.
        """
        if not patches or len({p.fingerprint for p in patches}) != 1:
            raise PatchError("concat needs at least one patch, all of the same model.")
        if any(p.steps and not p.originals for p in patches):
            raise PatchError("concat needs patches that are applied; a reverted one is among them.")
        originals: dict[int, dict[int, Tensor]] = {}
        written: dict[int, dict[int, int]] = {}
        for patch in patches:
            for layer, experts in patch.originals.items():
                for expert, original in experts.items():
                    originals.setdefault(layer, {}).setdefault(expert, original)
            for layer, checksums in patch.written.items():
                written.setdefault(layer, {}).update(checksums)
        return WeightPatch(
            [step for p in patches for step in p.steps],
            patches[0].fingerprint,
            {"parts": [p.metadata for p in patches]},
            [report for p in patches for report in p.reports],
            originals,
            written,
        )

    @staticmethod
    def _check_fits(view: MoELayerView, layer: int, update: FactoredUpdate) -> None:
        moe = view.require([layer])[0]
        layout = moe.experts.layout
        d, h = update.left.shape[0], update.right[0].shape[0]
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
        self.steps: list[tuple[int, FactoredUpdate]] = []
        self.reports: list[WriteReport] = []

    def write(self, layer: int, update: FactoredUpdate) -> WriteReport:
        """Add ``update`` to one layer: in float32, rounded once to the parameter's dtype.

        One grouped product per run of neighbouring experts, in tiles that stay in a CPU's cache or fill a GPU; beside
        the originals no second copy of the weights exists.

        Raises:
            NumericalError: the update, or a weight it leads to, is not finite.
        """
        moe = self.view.layers[layer]
        # On the weights' device, so that a patch read from a file is multiplied out as when it was made.
        device = next(iter(moe.experts.parameters()))[1].device
        update = update.to(device=device, dtype=torch.float32)
        if not update.is_finite():
            raise NumericalError(f"The update of layer {layer} holds NaN or infinity; nothing was kept of this edit.")
        saved = self.originals.setdefault(layer, {})
        lost = total = 0.0
        scratch = _Scratch()
        with torch.no_grad():
            saved.update(_originals(moe, [expert for expert in update.experts if expert not in saved]))
            for group in _groups(moe, update):
                lost, total = lost + group.add(moe, scratch), total + group.squared_norm()
        self.steps.append((layer, update))
        loss = (lost / total) ** 0.5 if total else 0.0
        self.reports.append(WriteReport(layer, loss, total**0.5, len(update.experts)))
        return self.reports[-1]

    def checksums(self) -> dict[int, dict[int, int]]:
        """Checksums of all written experts, by which a revert sees later changes."""
        return {
            layer: {expert: checksum(self.view.layers[layer].experts.read(expert)) for expert in experts}
            for layer, experts in self.originals.items()
        }

    def finish(self, metadata: Mapping[str, Any], fingerprint: str) -> WeightPatch:
        """The patch of everything written so far."""
        provenance = {**metadata, "versions": versions()}
        json.dumps(provenance)
        return WeightPatch(self.steps, fingerprint, provenance, self.reports, self.originals, self.checksums())


@contextmanager
def writing(view: MoELayerView) -> Iterator[PatchWriter]:
    """All writes inside are kept, or, if anything raises, none: the model is then bit-equal to before."""
    writer = PatchWriter(view)
    try:
        yield writer
    except BaseException:
        restore(view, writer.originals)
        raise


def restore(view: MoELayerView, originals: Mapping[int, Mapping[int, Tensor]]) -> None:
    """Copy originals back, bit for bit."""
    with torch.no_grad():
        for layer, experts in originals.items():
            for expert, original in experts.items():
                view.layers[layer].experts.read(expert).copy_(original)


def _loaded_update(tensors: Mapping[str, Tensor], i: int) -> FactoredUpdate:
    """Step ``i`` of a saved patch; KeyError where a part is missing."""
    sizes = tensors[f"{i}.sizes"].tolist()
    columns = torch.split(tensors[f"{i}.columns"], sizes)
    right = torch.split(tensors[f"{i}.right"], sizes, dim=1)
    return FactoredUpdate(tensors[f"{i}.left"], tuple(tensors[f"{i}.experts"].tolist()), columns, right)


_TILE = {"cpu": 400_000}
"""Numbers per tile of a write: on a CPU what its cache holds, elsewhere (`_LARGE_TILE`) enough to fill a GPU."""
_LARGE_TILE = 2**26


def tile_size(device: torch.device) -> int:
    """Numbers in one tile of a write; up to three tiles in float32 are its working memory."""
    return _TILE.get(device.type, _LARGE_TILE)


class _Scratch:
    """Working memory of a write, used again for each group: new memory is paged in more slowly than it is used."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._kind: Any = None

    def take(self, like: Tensor, number: int, size: int) -> Tensor:
        """``[number, size]`` of the dtype and device of ``like``, with any content."""
        kind = (like.device, like.dtype)
        if self._memory is None or self._memory.numel() < number * size or self._kind != kind:
            self._memory, self._kind = like.new_empty(number * size), kind
        return self._memory[: number * size].view(number, size)


@dataclass(frozen=True)
class _Group:
    """Neighbouring experts whose update is one batched product ``left @ right`` in the orientation of the storage.

    Attributes:
        experts: their indices.
        weights: ``[c, rows, columns]``, a view on the parameter.
        left, right: ``[c, rows, r]`` and ``[c, r, columns]``, padded with zeros to the largest rank r.
        transposed: rows and columns are h and d rather than d and h.
    """

    experts: tuple[int, ...]
    weights: Tensor
    left: Tensor
    right: Tensor
    transposed: bool

    def add(self, moe: MoELayer, scratch: _Scratch) -> float:
        """Write the sum; squared norm of what rounding lost."""
        dtype = torch.float64 if self.weights.dtype == torch.float64 else torch.float32
        left, right = self.left.to(dtype), self.right.to(dtype)
        count, rows, columns = self.weights.shape
        step = max(1, tile_size(left.device) // (count * columns))
        native = self.weights.dtype == dtype
        buffers = scratch.take(left, 2 if native else 3, count * min(step, rows) * columns)
        quick = not native and self._sum_is_exact()
        lost = torch.zeros((), dtype=torch.float64, device=left.device)
        for start in range(0, rows, step):
            tile, part = self.weights[:, start : start + step], left[:, start : start + step]
            first, second, *third = (buffer[: tile.numel()].view(tile.shape) for buffer in buffers)
            first.copy_(tile)
            # Conversions are copies of their own: mixed dtypes in one operation are slower on a CPU.
            if quick:
                tile.copy_(first.baddbmm_(part, right))
                error = first.sub_(second.copy_(tile))
            else:
                torch.bmm(part, right, out=second)
                if native:
                    after = tile.add_(second)
                else:
                    after = torch.add(first, second, out=third[0])
                    tile.copy_(after)
                    after.copy_(tile)
                error = first.sub_(after).add_(second)
            lost += torch.linalg.vector_norm(error).to(torch.float64) ** 2
        # A weight that is not finite leaves no finite loss, so the weights are only searched where that happens.
        if not torch.isfinite(lost):
            for expert, weight in zip(self.experts, self.weights, strict=True):
                if not torch.isfinite(weight).all():
                    raise NumericalError(
                        f"Expert {expert} of layer {moe.index} would become NaN or infinite in {weight.dtype}; nothing "
                        "was kept of this edit. Raise lambda_reg, or load the model in bfloat16 or float32."
                    )
        return float(lost)

    def _sum_is_exact(self) -> bool:
        """Whether the float32 sum's own error, about eps / 4 of a weight, is below a thousandth of the update."""
        some = self.weights[0, :16].float()
        weight = float(some.square().mean().sqrt())
        update = (self.squared_norm() / self.weights.numel()) ** 0.5
        return update > 250 * torch.finfo(torch.float32).eps * weight

    def squared_norm(self) -> float:
        """``||left @ right||^2`` from r x r Gram matrices."""
        left, right = self.left.to(torch.float64), self.right.to(torch.float64)
        return float(((left.mT @ left) * (right @ right.mT)).sum().clamp_min(0))


def _originals(moe: MoELayer, experts: list[int]) -> dict[int, Tensor]:
    """Copies of some experts' down-projections ``[d, h]``, in the orientation of the storage underneath.

    One allocation holds them all: the memory of many small ones is paged in 4 KiB at a time, which takes longer than
    the copying.
    """
    weights = [moe.experts.read(expert).detach() for expert in experts]
    if moe.experts.layout.transposed:
        weights = [weight.mT for weight in weights]
    if len({weight.device for weight in weights}) > 1:
        kept = [weight.clone() for weight in weights]
    else:
        kept = list(torch.stack(weights)) if weights else []
    if moe.experts.layout.transposed:
        kept = [weight.mT for weight in kept]
    return dict(zip(experts, kept, strict=True))


def _groups(moe: MoELayer, update: FactoredUpdate) -> Iterator[_Group]:
    """The experts of an update in runs of neighbours, each small enough that its sum fits a tile where one can be."""
    layout, experts = moe.experts.layout, update.experts
    rank = max((len(columns) for columns in update.columns), default=0)
    largest = max(layout.d_model * layout.d_hidden, rank * (layout.d_model + layout.d_hidden))
    most = max(1, tile_size(update.left.device) // largest) if layout.storage == "packed" else 1
    start = 0
    while start < len(experts):
        stop = start + 1
        while stop < len(experts) and stop - start < most and experts[stop] == experts[stop - 1] + 1:
            stop += 1
        parameter = moe.experts.parameters_of(experts[start])[1].data
        weights = parameter[experts[start] : experts[stop - 1] + 1] if parameter.dim() == 3 else parameter[None]
        lefts = [update.left[:, columns] for columns in update.columns[start:stop]]
        rights = list(update.right[start:stop])
        if layout.transposed:
            lefts, rights = rights, lefts
        yield _Group(experts[start:stop], weights, _padded(lefts), _padded(rights).mT, layout.transposed)
        start = stop


def _padded(factors: list[Tensor]) -> Tensor:
    """``[c, n, r]`` of factors ``[n, r_j]``, filled up with zero columns."""
    if len(factors) == 1:
        return factors[0][None]
    rank = max(factor.shape[1] for factor in factors)
    return torch.stack([torch.nn.functional.pad(factor, (0, rank - factor.shape[1])) for factor in factors])
