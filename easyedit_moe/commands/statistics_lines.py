"""The plan of statistics in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from easyedit_moe.editors.statistics_plan import StatisticsPlan


def statistics_lines(found: StatisticsPlan | None, hparams: Any) -> list[str]:
    """How large and how long; nothing for a method that needs none."""
    if found is None:
        return []
    import torch

    from easyedit_moe.editors.statistics_plan import matmul_speed

    wanted = hparams.device if isinstance(hparams.device, str) else f"cuda:{hparams.device}"
    there = wanted.startswith("cuda") and torch.cuda.is_available()
    device = wanted if there else "cpu"
    speed = matmul_speed(device, getattr(torch, hparams.dtype) if there else torch.float32)
    least, most = found.seconds(speed)
    tokens = "" if found.least_tokens is None else f"{found.least_tokens:,} to "
    layers = ", ".join(map(str, found.layers))
    return [
        f"Statistics of layers {layers}, unless they are in {hparams.stats_dir}: {found.disk_bytes / 1e9:.2f} GB on "
        f"disk, {tokens}{found.most_tokens:,} tokens of {hparams.mom2_dataset}.",
        f"At the {speed / 1e12:.2f} TFLOP/s of matrix products measured on {device}, gathering them takes at least "
        f"{_time(least)}" + (f", at most the whole corpus, {_time(most)}." if most > 1.05 * least else "."),
    ]


def _time(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s" if seconds >= 1 else "less than 1 s"
