"""What the stages of a solving editor need of memory: tensor by tensor, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch

from easyedit_moe.algebra.nullspace import CHUNK as EIGH_CHUNK
from easyedit_moe.algebra.ranks import resolve_rank
from easyedit_moe.algebra.systems import CHUNK, LARGEST
from easyedit_moe.algebra.tucker import CHUNK_NUMBERS
from easyedit_moe.hparams import MoTEHyperParams, SolverHyperParams
from easyedit_moe.moe.activations import inference
from easyedit_moe.moe.shapes import Lengths, Shapes
from easyedit_moe.patches.groups import tile_size
from easyedit_moe.statistics.moments import BATCH_TOKENS
from easyedit_moe.storage.checksums import TILE_BYTES
from easyedit_moe.targets.memory import search_bytes

PREPARED = ("moments", "statistics", "metric", "basis", "directions")
"""Stages before the first batch of edits."""


@dataclass(frozen=True)
class Stage:
    """One stage: ``kept`` bytes stay until the end of the edit, ``working`` bytes only while it runs.

    ``used_up``: what is kept goes as soon as the stages of `PREPARED` are done.
    """

    name: str
    kept: int
    working: int
    note: str = ""
    used_up: bool = False


def statistics_stage(shapes: Shapes, hparams: SolverHyperParams, stays: int = 0) -> Stage:
    """Second moments of all layers in one pass, and one batch of texts with the keys of one layer.

    ``stays`` are bytes of them that another stage counts, as they are not used up.
    """
    item = 8 if hparams.mom2_dtype == "float64" else 4
    layer = item * (shapes.experts * shapes.d_hidden**2 + shapes.d_model**2)
    keys = BATCH_TOKENS * shapes.active * shapes.d_hidden * max(shapes.itemsize, item)
    # Normalising makes the moments anew, layer by layer.
    working = max(layer, inference(shapes, BATCH_TOKENS) + keys)
    if hparams.protected_dataset is not None:  # their moments wait for those of the corpus
        working += layer * len(hparams.edited_layers)
    note = f"moments of all layers; {BATCH_TOKENS} tokens of texts at a time"
    return Stage("statistics", layer * len(hparams.edited_layers) - stays, working, note, used_up=True)


def metric_stage(shapes: Shapes, hparams: SolverHyperParams) -> Stage:
    """Projectors keep the cheaper side, at most half of h x h per expert; covariances a full factor. Float64."""
    e, h = shapes.experts, shapes.d_hidden
    square = 8 * h**2
    if hparams.metric == "covariance":
        kept, working = e * square, e * square + 4 * square
    else:
        free = null_rank(shapes, hparams)
        kept = e * 8 * h * (h // 2 if free is None else min(free, h - free))
        chunk = min(e, max(1, EIGH_CHUNK // h**2))
        # All moments in float64; of a chunk they are stacked, and become eigenvectors beside LAPACK's workspace.
        working = e * square + 2 * chunk * square + 2 * square
    return Stage("metric", kept * len(hparams.edited_layers), working, f"{hparams.metric} factors per expert")


def null_rank(shapes: Shapes, hparams: SolverHyperParams) -> int | None:
    """Dimension of each expert's null space, where the hparams say it; None where the statistics tell."""
    if hparams.metric != "nullspace" or hparams.nullspace_rank is None:
        return None
    return resolve_rank(hparams.nullspace_rank, shapes.d_hidden, "nullspace_rank")


def basis_stage(shapes: Shapes, hparams: MoTEHyperParams) -> Stage:
    """Tucker bases: chunks of weights in float32, and one mode's Gram matrix with its eigenvectors in float64."""
    e, d, h = shapes.experts, shapes.d_model, shapes.d_hidden
    re, ro, ri = tucker_ranks(shapes, hparams)
    kept = 8 * (e * re + d * ro + h * ri)
    numbers = max(CHUNK_NUMBERS, d * h, e * h)
    chunk = 4 * min(e * d * h, numbers)
    # A chunk is whitened, and then laid out for its product; of several, the last one is still there.
    summed = (2 if e * d * h <= numbers else 3) * chunk + (4 + 8 + 8) * max(d, h, e) ** 2
    eigh = (8 * 5) * max(d, h, e) ** 2
    working = max(summed, eigh)
    if hparams.whitening in ("out", "both"):
        working += 2 * 4 * e * d * h
    return Stage("basis", kept * len(hparams.edited_layers), working, f"{chunk // 2**20} MB of weights at a time")


def tucker_ranks(shapes: Shapes, hparams: MoTEHyperParams) -> tuple[int, int, int]:
    """Those of the hparams; all of each mode where only the weights tell them."""
    sizes = (shapes.experts, shapes.d_model, shapes.d_hidden)
    return hparams.ranks(*sizes) or sizes


def targets_stage(shapes: Shapes, layer: int, edits: int, contexts: int, lengths: Lengths, batch: int) -> Stage:
    """Target vectors at the output of ``layer`` for edits in some contexts each; see `search_bytes`."""
    together = min(edits, max(1, batch // (contexts + 1)))
    working = search_bytes(shapes, layer, together, contexts, lengths)
    note = f"{together * (contexts + 1)} sequences at a time"
    return Stage("targets", 4 * edits * shapes.d_model, working, note)


def capture_stage(
    shapes: Shapes, hparams: SolverHyperParams, edits: int, contexts: int, earlier: int, lengths: Lengths, batch: int
) -> Stage:
    """Keys of all layers at the fact tokens, inputs of the layers from which a later forward starts, and one batch of
    prompts up to the last edited layer.
    """
    own, layers = edits * contexts, len(hparams.edited_layers)
    solved = min(edits, getattr(hparams, "edits_per_solve", None) or edits) * contexts
    keys = shapes.active * (4 * shapes.d_hidden + 16)
    inputs = layers * solved * lengths.prompt * shapes.d_model * shapes.itemsize
    captured = 1 if hparams.spread == "update" else layers
    kept = (own * captured + earlier * layers) * keys + inputs + 3 * 4 * solved * shapes.d_model
    together = min(batch, solved)
    return Stage("capture", kept, inference(shapes, together * lengths.prompt), f"{together} prompts at a time")


def solve_stage(shapes: Shapes, hparams: SolverHyperParams, tokens: int, solves: int = 1) -> Stage:
    """One layer's system and its solution, by the form that `easyedit_moe.algebra.metric` chooses; float64.

    ``solves`` are those of a layer, one after the other.
    """
    free = null_rank(shapes, hparams)
    if isinstance(hparams, MoTEHyperParams):
        re, ro, ri = tucker_ranks(shapes, hparams)
        working, form = mote_bytes(shapes, tokens, re, ro, ri)
    elif hasattr(hparams, "num_passes"):
        working, form = bcd_bytes(shapes, tokens, hparams.metric, free)
    else:
        working, form = exact_bytes(shapes, tokens, hparams.metric, free)
    keys = tokens * shapes.active
    left = keys * shapes.d_model if hasattr(hparams, "num_passes") else tokens * shapes.d_model
    solution, residual = 8 * (left + keys * shapes.d_hidden), 4 * tokens * shapes.d_model
    if isinstance(hparams, MoTEHyperParams):
        _, ro, ri = tucker_ranks(shapes, hparams)
        solution = 8 * (tokens * ro + keys * ri)
    if hparams.spread == "once":
        # All layers' solutions are held until the first is written.
        return Stage(
            "solve", solution * len(hparams.layers), working + residual, f"{form}, {len(hparams.layers)} layers"
        )
    # The last layer's solution stays until the next one is written.
    again = solves > 1 or (hparams.spread == "residual" and len(hparams.layers) > 1)
    return Stage("solve", 0, working + residual + (solution if again else 0), form)


def changed_experts(shapes: Shapes, hparams: SolverHyperParams, tokens: int) -> int:
    """Experts that an update of so many tokens writes: a core writes all."""
    return shapes.experts if isinstance(hparams, MoTEHyperParams) else hit_experts(shapes, tokens)


def hit_experts(shapes: Shapes, tokens: int) -> int:
    """Experts that so many tokens reach, if routing is even."""
    missed = (1 - shapes.active / max(shapes.experts, shapes.active)) ** tokens
    return min(shapes.experts, round(shapes.experts * (1 - missed)))


def longest_run(experts: int, hit: int, draws: int) -> int:
    """Neighbours among ``hit`` of so many experts: the median of the longest run that ``draws`` even choices show."""
    missed, ways = experts - hit, comb(experts, hit)
    for run in range(1, hit):
        # Gaps between missed experts that are longer than the run, counted out by inclusion and exclusion.
        places = range(min(missed + 1, hit // (run + 1)) + 1)
        short = sum((-1) ** n * comb(missed + 1, n) * comb(experts - n * (run + 1), missed) for n in places)
        if (short / ways) ** draws >= 0.5:
            return run
    return hit


def _roots(shapes: Shapes, tokens: int, metric: str, free: int | None) -> tuple[int, int]:
    """Bytes of what the metric makes of all gated keys, and of what it lifts them to again; float64."""
    slots, h = 8 * tokens * shapes.active, shapes.d_hidden
    if metric == "identity":
        return 0, 0
    if metric == "covariance":
        return slots * h, slots * h
    if free is not None and 2 * free <= h:
        return slots * free, slots * h
    return slots * h, 0


def _accumulated(tokens: int, width: int) -> int:
    """One chunk of a design whose Gram matrix is summed chunk by chunk."""
    return 8 * min(CHUNK, tokens * width)


def exact_bytes(shapes: Shapes, tokens: int, metric: str, free: int | None = None) -> tuple[int, str]:
    """Working memory of `easyedit_moe.algebra.exact.solve_exact`, and the form it takes.

    ``free`` is the dimension of each expert's null space, where it is known.
    """
    keys, d = 8 * tokens * shapes.active * shapes.d_hidden, shapes.d_model
    root, lifted = _roots(shapes, tokens, metric, free)
    unknowns = hit_experts(shapes, tokens) * (free or shapes.d_hidden)
    blocks, wanted = root or keys, 8 * tokens * d
    if unknowns < tokens:
        # The Gram matrix is factored where it lies; then come the products and the two steps of solving.
        accumulating = 8 * (unknowns**2 + unknowns * d) + _accumulated(tokens, unknowns)
        solving = 8 * (unknowns**2 + 3 * unknowns * d) + 8 * unknowns * shapes.d_hidden
        return blocks + wanted + max(accumulating, solving), f"primal, side {unknowns}"
    gathered = keys + keys // 2 + root
    solving = blocks + 8 * tokens**2 + 2 * wanted
    lifting = blocks + lifted + 8 * tokens**2 + wanted
    return wanted + max(gathered, solving, lifting), f"dual, side {tokens}"


def bcd_bytes(shapes: Shapes, tokens: int, metric: str, free: int | None = None) -> tuple[int, str]:
    """Working memory of `easyedit_moe.algebra.bcd.solve_bcd` for evenly spread tokens, and the form it takes."""
    hit, h, d = hit_experts(shapes, tokens), shapes.d_hidden, shapes.d_model
    per_expert = -(-tokens * shapes.active // hit)
    side = min(per_expert, free or h)
    root, lifted = _roots(shapes, tokens, metric, free)
    primal, reduced = side < per_expert, 2 * tokens <= d
    width, columns = tokens if reduced else d, hit * side
    systems = hit * (side**2 if primal else 2 * per_expert**2) * (1 if side > LARGEST else 2)
    solutions = columns * width * (1 if side > LARGEST else 2)
    right = 8 * columns * h if primal else lifted
    left = 2 * columns * d
    if reduced:  # experts whose tokens are no fewer than the row space has dimensions are solved for in it
        left = 2 * width * d if width <= side else columns * (width + 2 * d)
    total = 8 * (tokens * (d + width) + systems + solutions + left)
    keys = 8 * tokens * shapes.active * h
    return (root or keys) + right + total, f"side {side} per expert"


def mote_bytes(shapes: Shapes, tokens: int, re: int, ro: int, ri: int) -> tuple[int, str]:
    """Working memory of `easyedit_moe.algebra.core.solve_mote`, its core placed, and the form it takes."""
    e, keys = shapes.experts, 8 * tokens * shapes.active * shapes.d_hidden
    inner, wanted, reduced = 8 * tokens * shapes.active * ri, 8 * tokens * shapes.d_model, 8 * tokens * ro
    coding = keys + keys // 2  # what the metric makes of them exists for one expert at a time
    checking = 44 * ro**2
    if re * ri < tokens:
        size = re * ri
        phi = _accumulated(tokens, size) + 8 * min(tokens, max(1, CHUNK // size)) * shapes.active * re
        solving = 8 * (size**2 + size * ro) + max(phi, 16 * size * ro)
        form = f"primal, side {size}"
    else:
        phi = 0 if re == e else _accumulated(tokens, re * ri) + 8 * tokens * shapes.active * re
        solving = 8 * tokens**2 + max(phi, 2 * reduced)
        form = f"dual, side {tokens}"
    return wanted + max(coding + inner, inner + checking, inner + reduced + solving), form


def write_stage(
    shapes: Shapes,
    hparams: SolverHyperParams,
    tokens: int,
    together: int,
    device: str,
    batches: int = 1,
    solves: int = 1,
    rank: int = 0,
) -> Stage:
    """Originals of the experts that are written, the patch's factors or cores in float32, and a few tiles.

    A core's factors exist for one group of experts at a time. ``tokens`` are those of all edits, ``together`` those
    that one solve is of, ``solves`` those of a layer. ``rank`` is that of every expert's own factor where an option
    for long runs changes the update; 0 where it is written as it was solved for.
    """
    ranks = tucker_ranks(shapes, hparams) if isinstance(hparams, MoTEHyperParams) else None
    experts = changed_experts(shapes, hparams, tokens)
    weights, size = shapes.d_model * shapes.d_hidden, tile_size(torch.device(device))
    # Neighbouring experts are written together.
    one = changed_experts(shapes, hparams, together)
    run = longest_run(shapes.experts, one, solves * len(hparams.edited_layers))
    tile = 4 * (2 if shapes.itemsize == 4 else 3) * min(size, run * weights)
    left, slots = tokens, tokens * shapes.active
    if rank:
        factors = 4 * rank * (shapes.d_model + experts * shapes.d_hidden)
        # What was solved for in float64; of a stretch of experts both factors, of a run those and what measures them.
        sides = rank * (shapes.d_model + shapes.d_hidden)
        run = min(experts, max(1, size // max(weights, sides)))
        measured = 8 * run * (sides + 3 * rank**2)
        tile = 2 * factors + 4 * min(experts, max(run, size // weights)) * sides + max(tile, measured)
    elif ranks and ranks[0] < shapes.experts:
        re, ro, ri = ranks
        factors = 4 * min(tokens * (min(shapes.active, re) * ri + ro + 2 * shapes.active), re * ro * ri)
        group = max(1, min(size // weights, experts)) * shapes.d_hidden
        tile += (8 + 4) * min(together, ro) * (2 * group + shapes.d_model) + 8 * ro * shapes.d_model
    else:
        left = slots if hasattr(hparams, "num_passes") else left
        factors = 4 * (left * shapes.d_model + slots * shapes.d_hidden)
    originals = experts * weights * shapes.itemsize
    kept = (originals + factors * batches) * len(hparams.edited_layers)
    checked = min(originals, 2 * TILE_BYTES)
    note = "originals for an exact revert; the patch's factors or cores"
    return Stage("write", kept, max(factors + tile, checked), note)
