"""What solving editors keep between batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from easyedit_moe.algebra.core_update import TuckerFactors
from easyedit_moe.algebra.metric import Metric
from easyedit_moe.algebra.tucker import TuckerBasis
from easyedit_moe.errors import NumericalError
from easyedit_moe.moe.tails import Tail


@dataclass(frozen=True)
class PreparedLayer:
    """One layer's part of `Prepared`; its second moments are kept for `preservation_bound` alone.

    Attributes:
        num_experts: E.
        tail: what lies between the experts' sum and the layer's output.
        metric: M of the objective.
        basis: Tucker basis (MoTE only).
        coverage: ``[E]`` int64, tokens of the corpus that reached each expert; None without statistics.
        null_space: ``[E]``, dimension of each expert's null space; None for another metric.
        directions: per expert, principal directions of its weights ``[h, r_j]`` (``sphere_energy`` only).
        moments: ``[E, h, h]``, second moments of the keys (``preservation_bound`` only).
    """

    num_experts: int
    tail: Tail
    metric: Metric
    basis: TuckerBasis | None = None
    coverage: Tensor | None = None
    null_space: tuple[int, ...] | None = None
    directions: tuple[Tensor, ...] | None = None
    moments: Tensor | None = None

    def needed_moments(self) -> tuple[Tensor, Tensor]:
        """Second moments, and how many tokens of the corpus reached each expert.

        Raises:
            NumericalError: it was prepared without them.
        """
        if self.moments is None or self.coverage is None:
            raise NumericalError("This layer was prepared without second moments; prepare it with these settings.")
        return self.moments, self.coverage

    def tucker_basis(self) -> TuckerBasis:
        """The basis.

        Raises:
            NumericalError: it was prepared by a method without one.
        """
        if self.basis is None:
            raise NumericalError("This layer was prepared without a Tucker basis; prepare it with MoTE's editor.")
        return self.basis

    @cached_property
    def tucker_factors(self) -> TuckerFactors:
        """What maps cores back to this layer: one value, which all patches of a run share.

        Raises:
            NumericalError: as `tucker_basis`.
        """
        return TuckerFactors.of(self.tucker_basis(), self.metric)


@dataclass(frozen=True)
class Prepared:
    """What depends on the unedited model and the corpus only; made once and used for every batch.

    Attributes:
        fingerprint: of the model.
        layers: by index, what solving at that layer needs.
        resumable: whether a forward may start at any of the layers; see `easyedit_moe.moe.probe.starts_anywhere`.
        seconds: time that preparing took.
    """

    fingerprint: str
    layers: dict[int, PreparedLayer]
    resumable: bool
    seconds: float
