"""What options for long runs keep, and what they need while they are at it, from shapes alone.

See `easyedit_moe.editors.lasting` for what they carry from batch to batch. The batch before is held by whoever may
return to it, so that what each batch makes anew exists twice while one is edited.
"""

from __future__ import annotations

from easyedit_moe.editors.stages import (
    Stage,
    changed_experts,
    metric_stage,
    null_rank,
    statistics_stage,
    tucker_ranks,
)
from easyedit_moe.hparams import MoTEHyperParams, SolverHyperParams
from easyedit_moe.moe.shapes import Shapes

FACT = 750
"""Bytes of a fact as Python keeps it: a request of some words, a tuple of its place's tokens, entries of dicts."""
STATE = 250
"""Bytes of what Python has of a tensor and its place, beside its numbers."""


def moments_stages(shapes: Shapes, hparams: SolverHyperParams) -> list[Stage]:
    """Of the statistics, what stays for ``preservation_bound``."""
    if hparams.preservation_bound is None or not hparams.needs_statistics:
        return []
    item = 8 if hparams.mom2_dtype == "float64" else 4
    kept = item * shapes.experts * shapes.d_hidden**2 * len(hparams.edited_layers)
    return [Stage("moments", kept, 0, "second moments of the keys, for preservation_bound")]


def directions_stages(shapes: Shapes, hparams: SolverHyperParams) -> list[Stage]:
    """What ``sphere_energy`` has of each expert's weights."""
    if hparams.sphere_energy is None:
        return []
    d, h = shapes.d_model, shapes.d_hidden
    # The leading eigenvectors are a view on all. Of one expert there are its weights, their product and LAPACK's part.
    kept, working = 8 * shapes.experts * h**2 * len(hparams.edited_layers), 8 * (2 * d * h + 5 * h**2)
    return [Stage("directions", kept, working, "principal directions per expert")]


def layer_bytes(shapes: Shapes, hparams: SolverHyperParams) -> int:
    """Bytes that a layer's state has, which every batch makes anew: what edits changed, running statistics, norms."""
    e, d, h = shapes.experts, shapes.d_model, shapes.d_hidden
    drift = 4 * e * d * h if hparams.keeps_drift else 0
    running = 8 * (e * (1 + 2 * h) + 1 + 2 * d) if hparams.sequence_rate is not None else 0
    return drift + running + (8 * e if hparams.norm_anchor is not None else 0)


def fact_bytes(shapes: Shapes, hparams: SolverHyperParams, contexts: int) -> int:
    """Bytes that each edited fact adds to what is carried, beside the keys that ``remember_edits`` keeps."""
    wanted = 4 * contexts * shapes.d_model * len(hparams.edited_layers) if hparams.cumulative_ridge else 0
    first = 4 * shapes.d_model + STATE if hparams.anchor_targets else 0
    return wanted + first + (FACT if hparams.join_facts or hparams.replay_facts else 0)


def before_stages(shapes: Shapes, hparams: SolverHyperParams, earlier: int, contexts: int) -> list[Stage]:
    """What ``earlier`` edits left, and statistics that are read again before this batch."""
    found = []
    state = layer_bytes(shapes, hparams) * len(hparams.edited_layers) if earlier else 0
    kept = state + earlier * fact_bytes(shapes, hparams, contexts)
    if kept:
        found.append(Stage("carried", kept, 0, f"what options for long runs keep of {earlier} earlier edits"))
    every = hparams.refresh_every
    if every is not None and earlier >= every and hparams.needs_statistics:
        gathered, metric = statistics_stage(shapes, hparams), metric_stage(shapes, hparams)
        working = gathered.kept + max(gathered.working, metric.working)
        # The last ones go when the batch before does; the first ones stay with the editor.
        known = 2 if earlier >= 2 * every else 1
        found.append(Stage("refresh", known * metric.kept, working, "statistics of the edited model, and its metric"))
    return found


def held_stages(shapes: Shapes, hparams: SolverHyperParams, tokens: int) -> list[Stage]:
    """The system of ``tokens`` remembered ones that an editor keeps from batch to batch, per layer that is solved for.

    As many numbers as there are pairs of tokens, or of unknowns where these are fewer; none where lambda is next to 0.
    """
    if not hparams.remember_edits or hparams.cumulative_ridge or not tokens:
        return []
    wide, unknowns = shapes.d_hidden, shapes.experts * (null_rank(shapes, hparams) or shapes.d_hidden)
    if isinstance(hparams, MoTEHyperParams):
        re, _, wide = tucker_ranks(shapes, hparams)
        unknowns = re * wide
    # BCD solves for its rows anew until there are more of them than unknowns.
    system = 0 if hasattr(hparams, "num_passes") else 8 * tokens**2 + tokens * shapes.active * (8 * wide + 16)
    one = 8 * unknowns**2 if tokens > unknowns else system
    layers = 1 if hparams.spread == "update" else len(hparams.edited_layers)
    return [Stage("held", one * layers, 0, f"the system of {tokens} remembered tokens")] if one else []


def after_stages(
    shapes: Shapes, hparams: SolverHyperParams, edits: int, earlier: int, contexts: int, tokens: int
) -> list[Stage]:
    """What the next batch is given, and what its making needs; ``tokens`` are those of all edits that are written."""
    d, changed = shapes.d_model, changed_experts(shapes, hparams, tokens)
    weights = shapes.experts * shapes.d_model * shapes.d_hidden
    kept = layer_bytes(shapes, hparams) * len(hparams.edited_layers) + edits * fact_bytes(shapes, hparams, contexts)
    if not kept:
        return []
    # Before the first edit there are the weights, and the zeros that what edits change begins with; later each
    # expert's step, and it in the order in which it is written.
    first = 2 * 4 * weights * hparams.keeps_drift
    later = 2 * 8 * changed * d * shapes.d_hidden * hparams.cumulative_ridge
    return [
        Stage("carried on", kept, later if earlier else first, "what options for long runs keep for the next batch")
    ]


def written_rank(shapes: Shapes, hparams: SolverHyperParams, together: int, earlier: int) -> int:
    """Rank of each expert's own factor in an update that an option changes; 0 where it is written as solved for."""
    if hparams.cumulative_ridge and earlier:
        return shapes.d_model
    if hparams.changes_updates and isinstance(hparams, MoTEHyperParams):
        return min(together, tucker_ranks(shapes, hparams)[1])
    return 0
