"""Texts that have a part of the statistics' weight however few their tokens: ``protected_dataset``."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch

from easyedit_moe.hparams import SolverHyperParams
from easyedit_moe.statistics.moments import LayerMoments

_HP = TypeVar("_HP", bound=SolverHyperParams)


def of_protected(hparams: _HP) -> _HP:
    """Settings whose corpus is ``protected_dataset``: all of it, up to ``mom2_n_samples`` texts."""
    source = hparams.protected_dataset or ""
    return replace(hparams, mom2_dataset=source, mom2_n_tokens=None, coverage_target=None, protected_dataset=None)


def mixed(texts: LayerMoments, protected: LayerMoments, share: float) -> LayerMoments:
    """Moments as of one corpus of whose tokens a ``share`` were of the protected texts.

    With n_j of all N routed tokens of the texts, m_j of the M of the protected ones, and s the share::

        C_j = ((1 - s) n_j / N  C_j + s m_j / M  P_j) / ((1 - s) n_j / N + s m_j / M)

    Counts are of tokens that were read, whatever they weigh. ``texts`` are overwritten, so that no third set of moments
    is needed.
    """
    weights = [part.counts.double() / part.counts.sum().clamp_min(1) for part in (texts, protected)]
    ours, theirs = (1 - share) * weights[0], share * weights[1]
    part = torch.where(theirs > 0, theirs / (ours + theirs), 0.0).to(texts.keys)
    keys = texts.keys.lerp_(protected.keys.to(texts.keys), part[:, None, None])
    output = texts.output.lerp_(protected.output.to(texts.output), share)
    return LayerMoments(keys, texts.counts + protected.counts, output, texts.num_tokens + protected.num_tokens)
