"""What an edit will need of memory, from shapes alone: before weights are loaded, before anything runs.

Editing arithmetic is counted tensor by tensor (its peak is measured against this plan by the tests and by
``python -m benchmarks growth``); the activations of the model's own forwards are an estimate. All is summed over
devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from easyedit_moe.algebra.tucker import CHUNK_NUMBERS
from easyedit_moe.errors import DenseModelError, HyperParamsError, LayoutError
from easyedit_moe.hparams import MoTEHyperParams, SolverHyperParams
from easyedit_moe.hparams.sites import EXPERTS
from easyedit_moe.moe.config import text_config
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.groups import tile_size

_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k", "moe_top_k")

PROMPT_TOKENS = 32
"""Tokens of a prompt that plans assume."""
TARGET_TOKENS = 4
"""Tokens of a target that plans assume."""


@dataclass(frozen=True)
class Shapes:
    """All of a model that a plan depends on.

    Attributes:
        experts, active, d_model, d_hidden: E, K, d, h of the edited layers (the largest of each).
        num_layers, vocabulary: of the model.
        parameters: bytes of all its parameters.
        itemsize: bytes per number of the down-projections.
    """

    experts: int
    active: int
    d_model: int
    d_hidden: int
    num_layers: int
    vocabulary: int
    parameters: int
    itemsize: int


@dataclass(frozen=True)
class Workload:
    """What is planned for.

    Attributes:
        edits: requests in the batch; None: the ``batch_size`` of the hparams.
        earlier_edits: edits of earlier batches that are remembered, for methods that do.
        budget: bytes, all devices together, to fit sizes to that results do not depend on; None: no bound.
        device: kind of device, "cpu" or "cuda"; None: that of the hparams.
    """

    edits: int | None = None
    earlier_edits: int = 0
    budget: int | None = None
    device: str | None = None

    def edits_of(self, hparams: Any) -> int:
        """Requests in the batch."""
        return int(hparams.batch_size if self.edits is None else self.edits)

    def device_of(self, hparams: Any) -> str:
        """Kind of device; a number in the hparams is a GPU's."""
        device = hparams.device if self.device is None else self.device
        return "cuda" if isinstance(device, int) else str(device).partition(":")[0]

    def checked_budget(self) -> int | None:
        """The budget.

        Raises:
            HyperParamsError: it is not positive.
        """
        if self.budget is not None and self.budget <= 0:
            raise HyperParamsError(f"The memory budget must be greater than 0; found {self.budget}.")
        return self.budget


@dataclass(frozen=True)
class Stage:
    """One stage: ``kept`` bytes stay until the end of the edit, ``working`` bytes only while it runs."""

    name: str
    kept: int
    working: int
    note: str = ""


@dataclass(frozen=True)
class MemoryPlan:
    """Stages in the order in which they run, and the chunk sizes they were planned with."""

    shapes: Shapes
    layers: tuple[int, ...]
    edits: int
    stages: tuple[Stage, ...]
    settings: dict[str, int]
    budget: int | None

    def peaks(self) -> list[int]:
        """Per stage, bytes at its peak: the model, what earlier stages kept, and its own."""
        held, out = self.shapes.parameters, []
        for stage in self.stages:
            out.append(held + stage.kept + stage.working)
            held += stage.kept
        return out

    @property
    def peak(self) -> int:
        """Bytes at the peak of the whole edit."""
        return max(self.peaks())

    @property
    def editing_peak(self) -> int:
        """Bytes at the peak beyond the model and what was prepared before (statistics, metric and basis)."""
        held, peak = 0, 0
        for stage in self.stages:
            if stage.name not in ("statistics", "metric", "basis"):
                peak = max(peak, held + stage.kept + stage.working)
                held += stage.kept
        return peak

    @property
    def fits(self) -> bool:
        """Whether the peak stays within the budget; True without one."""
        return self.budget is None or self.peak <= self.budget

    def summary(self) -> str:
        """One line for a log."""
        stages = ", ".join(f"{s.name} {peak / 1e9:.3f}" for s, peak in zip(self.stages, self.peaks(), strict=True))
        return f"planned memory in GB: model {self.shapes.parameters / 1e9:.3f}; peak of each stage: {stages}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "peaks": self.peaks(), "peak": self.peak, "fits": self.fits}


def shapes_of(model: nn.Module, layers: list[int] | tuple[int, ...], site: str = EXPERTS) -> Shapes:
    """Shapes of a model, which may lie on the meta device, of what is edited at one site.

    Raises:
        LayerError: layers that can't be edited. LayoutError: experts of unknown layout, or a config that does not say
            how many experts a token uses.
    """
    view = MoELayerView(model, without_weights=True, site=site)
    layouts = [moe.experts.layout for moe in view.require(layers)]
    config = text_config(model)
    named = (getattr(config, name) for name in _EXPERTS_PER_TOKEN if getattr(config, name, None))
    active = next(named, None) if site == EXPERTS else 1
    if active is None:
        raise LayoutError(
            f"The config of {type(model).__name__} names the experts per token by none of "
            f"{', '.join(_EXPERTS_PER_TOKEN)}; please report the model's class."
        )
    return Shapes(
        max(layout.num_experts for layout in layouts),
        int(active),
        max(layout.d_model for layout in layouts),
        max(layout.d_hidden for layout in layouts),
        int(config.num_hidden_layers),
        int(config.vocab_size),
        parameter_bytes(model),
        max(layout.dtype.itemsize for layout in layouts),
    )


def outline_of(model: nn.Module) -> Shapes:
    """As `shapes_of`, over all MoE layers; a dense model's FFN counts as one expert that every token uses."""
    try:
        return shapes_of(model, sorted(MoELayerView(model, without_weights=True).layers))
    except DenseModelError:
        text = text_config(model)
        width, vocabulary = int(text.hidden_size), int(text.vocab_size)
        hidden = int(getattr(text, "intermediate_size", None) or 4 * width)
        itemsize = next(model.parameters()).element_size()
        return Shapes(1, 1, width, hidden, int(text.num_hidden_layers), vocabulary, parameter_bytes(model), itemsize)


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters of a model, which may lie on the meta device."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def plan(
    shapes: Shapes,
    hparams: SolverHyperParams,
    edits: int | None = None,
    earlier_edits: int = 0,
    prompt_tokens: int = PROMPT_TOKENS,
    target_tokens: int = TARGET_TOKENS,
    budget: int | None = None,
    device: str = "cpu",
    batches: int = 1,
) -> MemoryPlan:
    """The memory plan of one batch of edits, or of the last of several whose patches are kept.

    Sizes that results do not depend on (``capture_batch_size``, ``target_batch_size``, ``statistics_batch_size`` and
    ``basis_chunk_numbers``) are halved from their defaults until their stage fits ``budget``; see
    `MemoryPlan.settings`.

    Args:
        shapes: of the model.
        hparams: of the method.
        edits: requests in the batch, by default ``hparams.batch_size``.
        earlier_edits: edits remembered from earlier batches; counted with ``remember_edits`` only.
        prompt_tokens: tokens of a prompt.
        target_tokens: tokens of a target.
        budget: bytes, all devices together.
        device: "cpu" or "cuda", on which the size of a tile depends.
        batches: batches of this size whose patches are joined and kept: they share their originals.

    Raises:
        HyperParamsError: a budget that is not positive, or ranks out of range.
    """
    Workload(budget=budget).checked_budget()
    edits = hparams.batch_size if edits is None else edits
    fitted = _Fitted(budget, shapes.parameters)
    contexts = len(hparams.context_prefixes) + 1
    tokens = edits * contexts
    rows = tokens + (earlier_edits * contexts if hparams.remember_edits else 0)
    if hparams.needs_statistics:
        fitted.add(lambda n: statistics_stage(shapes, hparams, n), "statistics_batch_size", 16)
    if hparams.metric != "identity":
        fitted.add(lambda _: metric_stage(shapes, hparams))
    if isinstance(hparams, MoTEHyperParams):
        fitted.add(lambda n: basis_stage(shapes, hparams, n), "basis_chunk_numbers", CHUNK_NUMBERS)
    length, last = prompt_tokens + target_tokens, hparams.layers[-1]
    most, captured = hparams.target_batch_size, hparams.capture_batch_size
    fitted.add(lambda n: targets_stage(shapes, last, tokens, length, n), "target_batch_size", most)
    fitted.add(lambda n: capture_stage(shapes, hparams, tokens, rows, prompt_tokens, n), "capture_batch_size", captured)
    fitted.add(lambda _: solve_stage(shapes, hparams, rows))
    fitted.add(lambda _: write_stage(shapes, hparams, rows, device, batches))
    return MemoryPlan(shapes, tuple(hparams.edited_layers), edits, tuple(fitted.stages), fitted.settings, budget)


class _Fitted:
    """Stages in turn, each with the largest size, halved from its default, at which it fits the budget."""

    def __init__(self, budget: int | None, held: int) -> None:
        self.budget, self.held = budget, held
        self.stages: list[Stage] = []
        self.settings: dict[str, int] = {}

    def add(self, make: Callable[[int], Stage], name: str = "", size: int = 0) -> None:
        stage = make(size)
        while self.budget is not None and size > 1 and self.held + stage.kept + stage.working > self.budget:
            size //= 2
            stage = make(size)
        if name:
            self.settings[name] = size
        self.stages.append(stage)
        self.held += stage.kept


def activations(shapes: Shapes, tokens: int) -> int:
    """Estimate of what one layer's forward holds: attention and residual stream, and the experts' inputs and keys."""
    return tokens * shapes.itemsize * (10 * shapes.d_model + shapes.active * (4 * shapes.d_hidden + 2 * shapes.d_model))


def statistics_stage(shapes: Shapes, hparams: SolverHyperParams, batch: int) -> Stage:
    """Second moments of all layers in one pass, and one batch of texts of full length."""
    item = 8 if hparams.mom2_dtype == "float64" else 4
    layer = item * (shapes.experts * shapes.d_hidden**2 + shapes.d_model**2)
    # Normalising makes the moments anew, layer by layer.
    return Stage(
        "statistics", layer * len(hparams.edited_layers), layer + activations(shapes, batch * hparams.max_length),
        "moments of all layers; one batch of texts",
    )  # fmt: skip


def metric_stage(shapes: Shapes, hparams: SolverHyperParams) -> Stage:
    """Projectors keep the cheaper side, at most half of h x h per expert; covariances a full factor. Float64."""
    square = 8 * shapes.d_hidden**2
    kept = shapes.experts * (square if hparams.metric == "covariance" else square // 2)
    return Stage("metric", kept * len(hparams.edited_layers), 6 * square, f"{hparams.metric} factors per expert")


def _ranks(shapes: Shapes, hparams: MoTEHyperParams) -> tuple[int, int, int]:
    """Those of the hparams; all of each mode where only the weights tell them."""
    sizes = (shapes.experts, shapes.d_model, shapes.d_hidden)
    return hparams.ranks(*sizes) or sizes


def basis_stage(shapes: Shapes, hparams: MoTEHyperParams, chunk_numbers: int) -> Stage:
    """Tucker bases: chunks of weights in float32, and one mode's Gram matrix with its eigenvectors in float64."""
    e, d, h = shapes.experts, shapes.d_model, shapes.d_hidden
    re, ro, ri = _ranks(shapes, hparams)
    kept = 8 * (e * re + d * ro + h * ri)
    chunk = 4 * min(e * d * h, max(chunk_numbers, d * h, e * h))
    gram = (4 + 8 + 8) * max(d, h, e) ** 2
    eigh = (8 * 6) * max(d, h, e) ** 2
    working = max(3 * chunk + gram, eigh)
    if hparams.whitening in ("out", "both"):
        working += 2 * 4 * e * d * h
    return Stage("basis", kept * len(hparams.edited_layers), working, f"{chunk // 2**20} MB of weights at a time")


def targets_stage(shapes: Shapes, layer: int, sequences: int, length: int, batch: int) -> Stage:
    """Target vectors at the output of ``layer``: activations of those above, kept for the gradient, and logits."""
    tokens = min(batch, 2 * sequences) * length
    above = shapes.num_layers - 1 - layer
    logits = tokens * shapes.vocabulary * (2 * 4 + shapes.itemsize)
    working = activations(shapes, tokens) * (above + 1) + logits
    return Stage("targets", 4 * sequences * shapes.d_model, working, f"{min(batch, 2 * sequences)} sequences at a time")


def capture_stage(
    shapes: Shapes, hparams: SolverHyperParams, tokens: int, rows: int, prompt_tokens: int, batch: int
) -> Stage:
    """Keys of one layer, and one batch of prompts up to the last edited layer; remembered keys stay."""
    keys = 4 * shapes.active * shapes.d_hidden + 16 * shapes.active
    working = 2 * tokens * (keys + 4 * shapes.d_model) + activations(shapes, min(batch, tokens) * prompt_tokens)
    held = hparams.remember_edits or hparams.spread == "once"
    kept = rows * keys * (len(hparams.edited_layers) if held else 1)
    return Stage("capture", kept, working, f"{min(batch, tokens)} prompts at a time")


def solve_stage(shapes: Shapes, hparams: SolverHyperParams, tokens: int) -> Stage:
    """One layer's system and its solution, by the form that `easyedit_moe.algebra.metric` chooses; float64."""
    if isinstance(hparams, MoTEHyperParams):
        re, ro, ri = _ranks(shapes, hparams)
        working, form = mote_bytes(shapes, tokens, re, ro, ri, hparams.metric)
    elif hasattr(hparams, "num_passes"):
        working, form = bcd_bytes(shapes, tokens, hparams.metric)
    else:
        working, form = exact_bytes(shapes, tokens, hparams.metric)
    if hparams.spread != "once":
        return Stage("solve", 0, working, form)
    # All layers' solutions are held until the first is written.
    solution = 8 * tokens * (shapes.d_model + shapes.active * shapes.d_hidden)
    return Stage("solve", solution * len(hparams.layers), working, f"{form}, {len(hparams.layers)} layers")


def _keys_bytes(shapes: Shapes, tokens: int, metric: str) -> int:
    """Gated keys in float64, and with a metric also what it makes of them."""
    return 8 * tokens * shapes.active * shapes.d_hidden * (1 if metric == "identity" else 2)


def _accumulated(tokens: int, width: int) -> int:
    """One chunk of a design whose Gram matrix is summed chunk by chunk."""
    return 8 * min(2**23, tokens * width)


def exact_bytes(shapes: Shapes, tokens: int, metric: str) -> tuple[int, str]:
    """Working memory of `easyedit_moe.algebra.exact.solve_exact`, and the form it takes."""
    keys, d = _keys_bytes(shapes, tokens, metric), shapes.d_model
    unknowns = min(shapes.experts, tokens * shapes.active) * shapes.d_hidden
    if unknowns < tokens:
        roots = 8 * unknowns * shapes.d_hidden
        size = 8 * (unknowns**2 + 4 * unknowns * d + tokens * d) + roots + _accumulated(tokens, unknowns)
        return keys + size, f"primal, side {unknowns}"
    return keys + 8 * (tokens**2 + 4 * tokens * d), f"dual, side {tokens}"


def bcd_bytes(shapes: Shapes, tokens: int, metric: str) -> tuple[int, str]:
    """Working memory of `easyedit_moe.algebra.bcd.solve_bcd` for evenly spread tokens, and the form it takes."""
    hit = min(shapes.experts, tokens * shapes.active)
    per_expert = -(-tokens * shapes.active // hit)
    side = min(per_expert, shapes.d_hidden)
    width = tokens if 2 * tokens <= shapes.d_model else shapes.d_model
    operators = hit * side * (per_expert + side)
    solution = hit * side * (2 * width + shapes.d_model)
    roots = hit * shapes.d_hidden**2 if side < per_expert else 0
    total = operators + solution + roots + 2 * tokens * (width + shapes.d_model)
    return _keys_bytes(shapes, tokens, metric) + 8 * total, f"side {side} per expert"


def mote_bytes(shapes: Shapes, tokens: int, re: int, ro: int, ri: int, metric: str) -> tuple[int, str]:
    """Working memory of `easyedit_moe.algebra.core.solve_mote`, its core placed, and the form it takes."""
    d, h, e = shapes.d_model, shapes.d_hidden, shapes.experts
    inner = 8 * tokens * shapes.active * ri
    keys = 8 * tokens * shapes.active * h
    if re * ri < tokens:
        size = re * ri
        dense = 8 * (size**2 + 4 * size * ro + 2 * tokens * d) + _accumulated(tokens, size)
        return keys + inner + dense, f"primal, side {size}"
    placed = 8 * tokens * shapes.active * h if re == e else 0
    system = 8 * (tokens**2 + 3 * tokens * ro + 2 * tokens * d) + (0 if re == e else _accumulated(tokens, re * ri))
    return inner + max(keys + system, system + placed), f"dual, side {tokens}"


def write_stage(shapes: Shapes, hparams: SolverHyperParams, tokens: int, device: str, batches: int = 1) -> Stage:
    """Originals of the experts that are written, the patch's factors or cores in float32, and a few tiles.

    A core's factors exist for one group of experts at a time.
    """
    ranks = _ranks(shapes, hparams) if isinstance(hparams, MoTEHyperParams) else None
    experts = shapes.experts if ranks else min(shapes.experts, tokens * shapes.active)
    weights = shapes.d_model * shapes.d_hidden
    left, slots, size = tokens, tokens * shapes.active, tile_size(torch.device(device))
    tile = 4 * 3 * min(size, experts * weights)
    if ranks and ranks[0] < shapes.experts:
        re, ro, ri = ranks
        factors = 4 * min(tokens * (min(shapes.active, re) * ri + ro + 2 * shapes.active), re * ro * ri)
        group = max(1, min(size // weights, experts)) * shapes.d_hidden
        tile += (8 + 4) * min(tokens, ro) * (2 * group + shapes.d_model) + 8 * ranks[1] * shapes.d_model
    else:
        left = slots if hasattr(hparams, "num_passes") else left
        factors = 4 * (left * shapes.d_model + slots * shapes.d_hidden)
    kept = (experts * weights * shapes.itemsize + factors * batches) * len(hparams.edited_layers)
    return Stage("write", kept, 2 * factors + tile, "originals for an exact revert; the patch's factors or cores")


def with_settings(hparams: SolverHyperParams, memory: MemoryPlan) -> SolverHyperParams:
    """The hparams with the batch sizes of a plan; its results are the same."""
    capture, target = memory.settings["capture_batch_size"], memory.settings["target_batch_size"]
    return replace(hparams, capture_batch_size=capture, target_batch_size=target)
