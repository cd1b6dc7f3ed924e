"""Statistics: tokens per second against a plain forward of the same tokens through the same layers."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.random_model import random_model
from easyedit_moe.facts.tokens import collate, pad_id
from easyedit_moe.moe import capture
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.loading import load_model
from easyedit_moe.statistics import moments
from easyedit_moe.statistics.corpus import load_texts


@dataclass(frozen=True)
class Options:
    """``shape`` is "factworld" (the bundled model) or one of ``random_model.SHAPES``; the first ``layers`` are read."""

    shape: str = "middle"
    layers: int = 4
    texts: int = 96
    repeats: int = 3
    dtype: str = "float32"
    device: str = "cpu"


def run(options: Options) -> list[dict[str, Any]]:
    """A row for the plain forward and one for the statistics; the least of ``repeats`` timings, taken in turns."""
    plain, tok = load_model("factworld", options.dtype, options.device)
    model = plain
    if options.shape != "factworld":
        model = random_model(options.shape, options.layers, len(tok), options.dtype, options.device)
    view, layers = MoELayerView(model), list(range(options.layers))
    texts = _texts(options)
    batches = [b for shard in moments.shards_of(texts, 512) for b in moments._batches(tok, shard, 512, 256)]
    tokens = sum(len(ids) for batch in batches for ids in batch)

    def forward() -> None:
        with capture.inference_mode_of(model):
            handle = capture.stop_after(view.decoder_layers[layers[-1]])
            for batch in batches:
                capture.run(model, collate(batch, pad_id(tok)))
            handle.remove()

    def statistics() -> None:
        moments.collect_moments(view, tok, texts, layers, progress=False)

    ways: dict[str, Callable[[], None]] = {"plain forward": forward, "statistics": statistics}
    seconds: dict[str, float] = dict.fromkeys(ways, float("inf"))
    for _ in range(options.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if options.device != "cpu":
                torch.cuda.synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return [
        {
            "benchmark": "statistics",
            "way": name,
            "shape": options.shape,
            "layers": options.layers,
            "dtype": options.dtype,
            "tokens": tokens,
            "seconds": value,
            "tokens_per_second": tokens / value,
            "times_a_plain_forward": value / seconds["plain forward"],
        }
        for name, value in seconds.items()
    ]


def _texts(options: Options) -> list[str]:
    """Texts of the bundled corpus; joined to longer ones for the larger shapes, as in a real corpus."""
    texts = load_texts("factworld")
    if options.shape == "factworld":
        return (texts * (options.texts // len(texts) + 1))[: options.texts]
    long = [" ".join(texts[i : i + 20]) for i in range(0, len(texts), 20)]
    return (long * (options.texts // len(long) + 1))[: options.texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in asdict(Options()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    for row in run(Options(**vars(parser.parse_args()))):
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
