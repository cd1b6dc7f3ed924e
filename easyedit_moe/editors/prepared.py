"""What solving editors keep between batches."""

from __future__ import annotations

from dataclasses import dataclass, field

from easyedit_moe.algebra.metric import Metric
from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.algebra.tucker import TuckerBasis
from easyedit_moe.statistics.moments import LayerMoments


@dataclass(frozen=True)
class Prepared:
    """What depends on the unedited model and the corpus only; made once and used for every batch.

    Attributes:
        fingerprint: of the model.
        experts: per layer, the number of experts.
        gains: per layer, how much the MoE block's output moves the layer's output.
        metrics: per layer, the metric M.
        bases: per layer, the Tucker basis (MoTE only).
        moments: per layer, the statistics (empty for the identity metric without whitening).
        resumable: whether a forward may start at any of the layers; see :func:`easyedit_moe.moe.probe.starts_anywhere`.
        seconds: time that preparing took.
    """

    fingerprint: str
    experts: dict[int, int]
    gains: dict[int, float]
    metrics: dict[int, Metric]
    bases: dict[int, TuckerBasis]
    moments: dict[int, LayerMoments]
    resumable: bool
    seconds: float


@dataclass(frozen=True)
class EditMemory:
    """Keys of earlier batches per layer, for ``remember_edits``; a value: passed in, and returned extended."""

    keys: dict[int, list[RoutedKeys]] = field(default_factory=dict)

    def extended(self, new: dict[int, list[RoutedKeys]]) -> EditMemory:
        """A memory that also holds ``new``."""
        merged = {layer: list(parts) for layer, parts in self.keys.items()}
        for layer, parts in new.items():
            merged.setdefault(layer, []).extend(parts)
        return EditMemory(merged)
