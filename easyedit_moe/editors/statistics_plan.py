"""How large the statistics of a method will be and how long they take, from shapes alone, before a weight is loaded."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from easyedit_moe.hparams import MoTEHyperParams, SolverHyperParams
from easyedit_moe.moe.layers import MoELayerView, decoder_stack
from easyedit_moe.moe.shapes import shapes_of
from easyedit_moe.statistics.corpus import GENERATED


@dataclass(frozen=True)
class StatisticsPlan:
    """What gathering once will cost.

    Attributes:
        layers: that are gathered in one pass over the corpus.
        disk_bytes: of all files in the cache: moments (those of ``protected_dataset``, too), and MoTE's bases.
        least_tokens: tokens of the corpus to read if routing were even; None where the whole corpus is read.
        most_tokens: tokens of the whole corpus, each text cut at ``max_length``; ``protected_dataset`` adds its own.
        flops_per_token: floating-point operations: the forward up to the last of the layers, and the moments' sums; for
            "generated" also the forward that samples.
    """

    layers: tuple[int, ...]
    disk_bytes: int
    least_tokens: int | None
    most_tokens: int
    flops_per_token: float

    def seconds(self, flops_per_second: float) -> tuple[float, float]:
        """Least and most seconds at a speed of arithmetic, which an actual run reaches at best."""
        least = self.most_tokens if self.least_tokens is None else self.least_tokens
        return (
            least * self.flops_per_token / flops_per_second,
            self.most_tokens * self.flops_per_token / flops_per_second,
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def plan_statistics(hparams: Any, model: nn.Module) -> StatisticsPlan | None:
    """The plan for hyper-parameters and a model, which may lie on the meta device; None where none are needed.

    Raises:
        LayerError, LayoutError: the model lacks the layers, or its config does not tell its sizes.
    """
    if not isinstance(hparams, SolverHyperParams) or not hparams.needs_statistics:
        return None
    hp, shapes = hparams, shapes_of(model, hparams.layers, hparams.site)
    e, d, h, k = shapes.experts, shapes.d_model, shapes.d_hidden, shapes.active
    item = 8 if hp.mom2_dtype == "float64" else 4
    moments = item * (e * h * h + d * d) + 8 * e
    disk = moments if hp.protected_dataset is None else 2 * moments
    if isinstance(hp, MoTEHyperParams):
        sizes = (e, d, h)
        disk += 8 * sum(size * rank for size, rank in zip(sizes, hp.ranks(*sizes) or sizes, strict=True))
    sampled = hp.mom2_dataset == GENERATED
    most = hp.mom2_n_samples * (min(hp.max_length, hp.generated_length) if sampled else hp.max_length)
    if hp.mom2_n_tokens is not None and not sampled:
        most = min(most, hp.mom2_n_tokens)
    least = None if hp.coverage_target is None else min(most, int(hp.coverage_target * h * e / k))
    sums = 2.0 * (k * h * h + d * d) * len(hp.edited_layers)
    flops = sums + _forward_flops(model, hp.layers[-1], k)
    if sampled:  # each token is one forward through all layers before it is read
        flops += _forward_flops(model, shapes.num_layers - 1, k)
    return StatisticsPlan(tuple(hp.edited_layers), disk * len(hp.edited_layers), least, most, flops)


def matmul_speed(device: str = "cpu", dtype: torch.dtype = torch.float32, seconds: float = 0.2) -> float:
    """Floating-point operations per second of this machine's matrix products, measured for about ``seconds``."""
    size = 1024 if device == "cpu" else 4096
    left = torch.ones(size, size, dtype=dtype, device=device)
    left @ left
    _wait(device)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        left @ left
        count += 1
        _wait(device)
    return float(2 * size**3 * count / (time.perf_counter() - start))


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _forward_flops(model: nn.Module, last: int, active: int) -> float:
    """Two operations per token and parameter that it meets, from the first layer to ``last``."""
    stack, _ = decoder_stack(model)
    view = MoELayerView(model, without_weights=True)
    met = 0.0
    for index in range(last + 1):
        whole: float = sum(parameter.numel() for parameter in stack[index].parameters())
        moe = view.layers.get(index)
        if moe is not None:
            routed = sum(p.numel() for p in model.get_submodule(moe.experts_name).parameters())
            whole -= routed * (1 - active / moe.experts.layout.num_experts)
        met += whole
    return 2.0 * met
