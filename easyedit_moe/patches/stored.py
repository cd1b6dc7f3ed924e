"""What a patch of factored updates says of itself in its file, and how the factors lie there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from easyedit_moe.algebra.routed_keys import FactoredUpdate
from easyedit_moe.hparams.sites import EXPERTS
from easyedit_moe.moe.layers import MoELayer
from easyedit_moe.moe.wrappers import plain_name
from easyedit_moe.patches.flips import check_flips
from easyedit_moe.patches.record import SavedRecord
from easyedit_moe.storage.schema import Expected, check_tensors

Checksums = dict[int, dict[int, int]]
"""Layer -> expert -> checksum of its down-projection ``[d, h]``."""


@dataclass(frozen=True)
class WriteReport:
    """What one write did to one layer.

    Attributes:
        layer: index of the layer.
        rounding_loss: ``||applied - intended|| / ||intended||`` over the layer; what the parameter's dtype swallowed.
        update_norm: Frobenius norm of the intended update.
        experts: number of experts written.
        update_squared: squared Frobenius norm of each expert's intended update.
        weight_squared: squared Frobenius norm of each of those experts' down-projections before the write.
    """

    layer: int
    rounding_loss: float
    update_norm: float
    experts: int
    update_squared: dict[int, float] = field(default_factory=dict)
    weight_squared: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredExperts:
    """Where a layer's down-projections lie in a model, by name; so that files can be read without the model.

    Attributes:
        name: full name of the experts module, without wrappers.
        parameter: name of the parameter within it; ``{expert}`` stands for the expert where each has its own.
        transposed: stored as ``[h, d]`` rather than ``[d, h]``.
        experts: how many experts the layer has.
        dtype: of the parameter, such as "bfloat16".
    """

    name: str
    parameter: str
    transposed: bool
    experts: int
    dtype: str

    @staticmethod
    def of(moe: MoELayer) -> StoredExperts:
        """As a model has them."""
        layout, (name, parameter) = moe.experts.layout, moe.experts.parameters_of(0)
        if layout.storage != "packed":
            name = "{expert}" + name.removeprefix("0")
        dtype = str(parameter.dtype).removeprefix("torch.")
        return StoredExperts(
            plain_name(moe.experts_name), plain_name(name), layout.transposed, layout.num_experts, dtype
        )

    @property
    def single(self) -> bool:
        """The one expert is a linear layer, whose weight is its down-projection."""
        return self.experts == 1 and self.parameter.endswith(".weight")

    @property
    def packed(self) -> bool:
        """One parameter holds all experts, along its first dimension."""
        return "{expert}" not in self.parameter and not self.single

    def parameter_of(self, expert: int) -> str:
        """Full name of the parameter that holds an expert's down-projection."""
        return f"{self.name}.{self.parameter.format(expert=expert)}"

    def matrix(self, parameter: Tensor, expert: int) -> Tensor:
        """``W_j [d, h]``, a view, in the parameter that `parameter_of` names."""
        weight = parameter
        if self.packed:
            # All experts below one another are one matrix.
            weight = (parameter if parameter.dim() == 3 else parameter.unflatten(0, (self.experts, -1)))[expert]
        return weight.mT if self.transposed else weight


@dataclass(frozen=True, kw_only=True)
class SavedWeights(SavedRecord):
    """Metadata of a file, named as in `easyedit_moe.patches.weights.WeightPatch`; ``layers`` are those of its steps."""

    layers: list[int]
    stored: dict[int, StoredExperts]
    before: Checksums
    after: Checksums
    reports: list[WriteReport]
    site: str = EXPERTS


FLIPS = "flips."
"""What the names of flips begin with in a file; layer and expert follow."""


def shared_part(update: FactoredUpdate) -> tuple[int, ...]:
    """What tells whether two updates differ in their left factor only: the very same other tensors."""
    return (*update.experts, *(id(tensor) for tensor in (*update.columns, *update.right)))


def step_tensors(i: int, update: FactoredUpdate, same: int | None = None) -> dict[str, Tensor]:
    """The factors of step ``i`` by their names in a file; ``same`` is the first step with all of them but the left."""
    left = {f"{i}.left": update.left.clone()}  # two steps may share it, which safetensors refuses
    if same is not None and same != i:
        return {**left, f"{i}.same": torch.tensor([same])}
    return {
        **left,
        f"{i}.experts": torch.tensor(update.experts),
        f"{i}.sizes": torch.tensor([len(c) for c in update.columns]),
        f"{i}.columns": torch.cat(update.columns),
        f"{i}.right": torch.cat(update.right, dim=1),
    }


def steps_of(tensors: Mapping[str, Tensor], saved: SavedWeights) -> list[tuple[int, FactoredUpdate]]:
    """Layer and factors of each step of a file.

    Raises:
        ValueError: factors that are missing, not asked for, of other dtypes or shapes, not finite, or of experts that
            the metadata do not speak of.
    """
    factors = {name: tensor for name, tensor in tensors.items() if not name.startswith(FLIPS)}
    expected: dict[str, Expected] = {}
    whole, real = (torch.int64,), (torch.float32,)
    for i in range(len(saved.layers)):
        expected[f"{i}.left"] = Expected((f"d{i}", f"C{i}"), real)
        if f"{i}.same" in factors:
            expected[f"{i}.same"] = Expected((1,), whole)
            continue
        expected[f"{i}.experts"] = expected[f"{i}.sizes"] = Expected((f"n{i}",), whole)
        expected[f"{i}.columns"] = Expected((f"r{i}",), whole)
        expected[f"{i}.right"] = Expected((f"h{i}", f"r{i}"), real)
    check_tensors(factors, expected)
    steps = [(layer, _update(factors, i)) for i, layer in enumerate(saved.layers)]
    _check_layers(steps, saved)
    return steps


def _update(tensors: Mapping[str, Tensor], i: int) -> FactoredUpdate:
    if f"{i}.same" in tensors:
        first = int(tensors[f"{i}.same"])
        if not 0 <= first < i or f"{first}.right" not in tensors:
            raise ValueError(f"step {i} has the factors of step {first}, which holds none before it")
        other, left = _update(tensors, first), tensors[f"{i}.left"]
        if left.shape != other.left.shape:
            raise ValueError(f"the left factor of step {i} is not of the size of step {first}'s")
        return replace(other, left=left)
    sizes, experts = tensors[f"{i}.sizes"].tolist(), tensors[f"{i}.experts"].tolist()
    columns, left = tensors[f"{i}.columns"], tensors[f"{i}.left"]
    if not experts or experts != sorted(set(experts)) or experts[0] < 0:
        raise ValueError(f"the experts of step {i} are not increasing numbers")
    if min(sizes) < 0 or sum(sizes) != len(columns):
        raise ValueError(f"the sizes of step {i} are not those of its columns")
    if len(columns) and not (int(columns.min()) >= 0 and int(columns.max()) < left.shape[1]):
        raise ValueError(f"step {i} names columns that it does not hold")
    right = torch.split(tensors[f"{i}.right"], sizes, dim=1)
    return FactoredUpdate(left, tuple(experts), torch.split(columns, sizes), right)


def _check_layers(steps: list[tuple[int, FactoredUpdate]], saved: SavedWeights) -> None:
    written: dict[int, set[int]] = {}
    for layer, update in steps:
        written.setdefault(layer, set()).update(update.experts)
    for layer, experts in written.items():
        if layer not in saved.stored or not 0 <= max(experts) < saved.stored[layer].experts:
            raise ValueError(f"it does not say where the experts that it writes in layer {layer} are stored")
    for table in (saved.before, saved.after):
        known = {layer: set(experts) for layer, experts in table.items()}
        if known.keys() - written.keys() or any(known[n] - written[n] for n in known):
            raise ValueError("it holds checksums of experts that it does not write")
    if _places(saved.before) != _places(saved.after):
        raise ValueError("its checksums before and after it are not of the same experts")


def flips_of(tensors: Mapping[str, Tensor], saved: SavedWeights) -> dict[int, dict[int, Tensor]]:
    """Layer -> expert -> flips that a file holds.

    Raises:
        ValueError: they are not bytes in a row, or not of the experts that the patch writes.
    """
    found: dict[int, dict[int, Tensor]] = {}
    flips = {name: bits for name, bits in tensors.items() if name.startswith(FLIPS)}
    check_flips(flips)
    wanted = {f"{FLIPS}{layer}.{expert}": (layer, expert) for layer, expert in _places(saved.before)}
    if bool(flips) != bool(saved.originals) or (flips and flips.keys() != wanted.keys()):
        raise ValueError("it holds originals of other experts than it changes")
    for name, bits in flips.items():
        layer, expert = wanted[name]
        found.setdefault(layer, {})[expert] = bits
    return found


def _places(table: Checksums) -> set[tuple[int, int]]:
    return {(layer, expert) for layer, experts in table.items() for expert in experts}
