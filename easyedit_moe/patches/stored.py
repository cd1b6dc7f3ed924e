"""What a patch of updates of down-projections says of itself in its file; its steps: `easyedit_moe.patches.steps`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from easyedit_moe.hparams.sites import EXPERTS
from easyedit_moe.moe.layers import MoELayer
from easyedit_moe.moe.wrappers import plain_name
from easyedit_moe.patches.flips import check_flips
from easyedit_moe.patches.record import SavedRecord

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


def flips_of(tensors: Mapping[str, Tensor], saved: SavedWeights) -> dict[int, dict[int, Tensor]]:
    """Layer -> expert -> flips that a file holds.

    Raises:
        ValueError: they are not bytes in a row, or not of the experts that the patch writes.
    """
    found: dict[int, dict[int, Tensor]] = {}
    flips = {name: bits for name, bits in tensors.items() if name.startswith(FLIPS)}
    check_flips(flips)
    wanted = {f"{FLIPS}{layer}.{expert}": (layer, expert) for layer, expert in places(saved.before)}
    if bool(flips) != bool(saved.originals) or (flips and flips.keys() != wanted.keys()):
        raise ValueError("it holds originals of other experts than it changes")
    for name, bits in flips.items():
        layer, expert = wanted[name]
        found.setdefault(layer, {})[expert] = bits
    return found


def places(table: Checksums) -> set[tuple[int, int]]:
    """Layer and expert of every checksum."""
    return {(layer, expert) for layer, experts in table.items() for expert in experts}
