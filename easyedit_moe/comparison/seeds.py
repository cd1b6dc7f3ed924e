"""A random method by several seeds: its settings by each, and one row of them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from easyedit_moe.comparison.retention import Retention
from easyedit_moe.comparison.rows import SCORES, Row
from easyedit_moe.errors import HyperParamsError
from easyedit_moe.evaluation.metrics import EvaluationResult
from easyedit_moe.evaluation.summary import Score
from easyedit_moe.host.baseline_hparams import BaselineHyperParams
from easyedit_moe.hparams import MoEHyperParams
from easyedit_moe.statistics.corpus import GENERATED

AnyHyperParams = MoEHyperParams | BaselineHyperParams


def seeded(hparams: AnyHyperParams, seeds: Sequence[int]) -> list[tuple[int, AnyHyperParams]]:
    """The settings by each seed; empty for a method that draws nothing, or without seeds.

    Random are the order of MoEEdit's experts, initial weights and order of what is trained, and sampled statistics.
    Target vectors start from zero and draw nothing. EasyEdit's own methods seed themselves and run once.

    Raises:
        HyperParamsError: a seed is given twice.
    """
    if len(set(seeds)) < len(seeds):
        raise HyperParamsError(f"Seeds must differ; found {', '.join(map(str, seeds))}.")
    names = ["seed"] if hasattr(hparams, "seed") else []
    if getattr(hparams, "mom2_dataset", None) == GENERATED:
        names.append("generated_seed")
    if not names or isinstance(hparams, BaselineHyperParams):
        return []
    changes: list[dict[str, Any]] = [dict.fromkeys(names, seed) for seed in seeds]
    return [(seed, replace(hparams, **change)) for seed, change in zip(seeds, changes, strict=True)]


def pooled(rows: Sequence[Row], seeds: Sequence[int], hparams: AnyHyperParams) -> Row:
    """One row of a method's rows by several seeds: means, the largest memory and rounding loss, and every warning."""
    first = rows[0]
    reached = [row.targets_reached for row in rows if row.targets_reached is not None]
    losses = [row.rounding_loss for row in rows if row.rounding_loss is not None]
    scores = {name: Score.over_seeds([getattr(row.scores, name) for row in rows]) for name in SCORES}
    ways = [row.retention for row in rows if row.retention is not None]
    theirs = [row.easyedit for row in rows if row.easyedit is not None]
    return replace(
        first,
        scores=EvaluationResult(first.scores.protocol, **scores),
        routing=_mean_of([row.routing for row in rows]),
        seconds=_mean_of([dict(row.seconds) for row in rows]),
        peak_memory_bytes=max(row.peak_memory_bytes for row in rows),
        targets_reached=round(sum(reached) / len(reached)) if reached else None,
        rounding_loss=max(losses, default=None),
        hparams=hparams.to_dict(),
        easyedit=_scores_of(theirs),
        answers=_scores_of([row.answers for row in rows if row.answers is not None]),
        retention=Retention.over_seeds(ways) if ways else None,
        warnings=tuple(dict.fromkeys(text for row in rows for text in row.warnings)),
        seeds=tuple(seeds),
        per_seed=tuple({name: getattr(row.scores, name).mean for name in SCORES} for row in rows),
    )


def _scores_of(found: Sequence[dict[str, Score]]) -> dict[str, Score] | None:
    return {name: Score.over_seeds([one[name] for one in found]) for name in found[0]} if found else None


def _mean_of(values: Sequence[Any]) -> Any:
    """Of numbers, in dicts of the same keys however deep; what is no number is that of the first."""
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _mean_of([value[key] for value in values]) for key in first}
    return sum(values) / len(values) if isinstance(first, (int, float)) else first
