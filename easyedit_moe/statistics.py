"""Statistics of the critical layers: from the cache where they are there, collected in one pass where not.

An interrupted run goes on where it was. On several GPUs, or processes, the texts are shared between them:
``torchrun --nproc-per-node 8 -m easyedit_moe.statistics Global/qwen3-30b-a3b`` fills the cache for later edits.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from easyedit_moe.cache import StatisticsKey, load_moments, save_moments, statistics_folder
from easyedit_moe.checkpoint import MomentsCheckpoint
from easyedit_moe.corpus import corpus_hash, load_texts
from easyedit_moe.distributed import least_over_processes, process_group, rank_and_size
from easyedit_moe.errors import CoverageWarning, HyperParamsError
from easyedit_moe.facts.tokens import encode_text
from easyedit_moe.hparams import SolverHyperParams, load_hyperparams
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayer, MoELayerView
from easyedit_moe.moe.loading import load_model
from easyedit_moe.moments import LayerMoments, collect_moments

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0
"""Least time between two writes of the sums of a run that is under way."""


def layer_statistics(
    view: MoELayerView,
    tok: PreTrainedTokenizerBase,
    hparams: SolverHyperParams,
    layers: Sequence[int],
    fingerprint: str,
    progress: bool = True,
) -> dict[int, LayerMoments]:
    """Moments of ``layers`` on ``hparams.mom2_dataset``, cached under ``hparams.stats_dir``.

    Where torch.distributed was initialised, all of its processes must call this, and all return the same.

    Warns :class:`CoverageWarning` about experts that too few tokens reached.

    Raises:
        DataError: the corpus can't be read. CacheError: a cached file is corrupt or of another model.
    """
    texts = load_texts(hparams.mom2_dataset, hparams.mom2_n_samples)
    corpus = corpus_hash(texts)
    # Another tokenizer, or other special tokens, shows on the first few texts already.
    tokens = corpus_hash([str(encode_text(tok, text)) for text in texts[:8]])
    folder = statistics_folder(hparams.stats_dir, hparams.model_name, fingerprint)
    keys = {
        layer: StatisticsKey(
            fingerprint,
            layer,
            corpus,
            tokens,
            len(texts),
            hparams.max_length,
            hparams.mom2_dtype,
            hparams.coverage_target,
        )
        for layer in layers
    }
    # What is missing on one process is collected by all.
    there = {layer: bool(least_over_processes(int((folder / key.file_name()).exists()))) for layer, key in keys.items()}
    moments = {
        layer: _on_device_of(view.layers[layer], load_moments(folder / key.file_name(), key))
        for layer, key in keys.items()
        if there[layer]
    }
    missing = [layer for layer in layers if not there[layer]]
    if missing:
        checkpoint = MomentsCheckpoint(folder, {layer: keys[layer] for layer in missing}, CHECKPOINT_SECONDS)
        collected = collect_moments(
            view,
            tok,
            texts,
            missing,
            hparams.max_length,
            getattr(torch, hparams.mom2_dtype),
            progress=progress and rank_and_size()[0] == 0,
            coverage_target=hparams.coverage_target,
            checkpoint=checkpoint,
        )
        if rank_and_size()[0] == 0:
            for layer, value in collected.items():
                save_moments(folder / keys[layer].file_name(), keys[layer], value)
        least_over_processes(0)  # no process goes on before the files are there
        checkpoint.remove()
        moments.update(collected)
    _report_coverage(moments, hparams)
    return {layer: moments[layer] for layer in layers}


def _on_device_of(moe: MoELayer, value: LayerMoments) -> LayerMoments:
    """Moments read from a file, where freshly collected ones would be: beside the layer's weights."""
    device = next(iter(moe.experts.parameters()))[1].device
    return LayerMoments(value.keys.to(device), value.counts.to(device), value.output.to(device), value.num_tokens)


def _report_coverage(moments: dict[int, LayerMoments], hparams: SolverHyperParams) -> None:
    for layer, value in sorted(moments.items()):
        coverage = value.coverage()
        logger.info(
            "Layer %d: %d tokens, per expert at least %d, median %.0f.",
            layer, value.num_tokens, coverage.minimum, coverage.median,
        )  # fmt: skip
        if coverage.thin:
            warnings.warn(
                f"Layer {layer}: {len(coverage.thin)} of {len(value.counts)} experts were reached by fewer than "
                f"{coverage.d_hidden} tokens (the fewest: {coverage.minimum}), so their statistics are rank deficient. "
                f"low_coverage is {hparams.low_coverage!r} below min_coverage {hparams.min_coverage}; a larger corpus "
                "or another choice may be wiser.",
                CoverageWarning,
                stacklevel=3,
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect the statistics of an hparams file, alone or as one process of ``torchrun``."""
    parser = argparse.ArgumentParser(prog="python -m easyedit_moe.statistics", description=__doc__)
    parser.add_argument("hparams", help="YAML file, or a name that ships with the package such as MoTE/factworld")
    parser.add_argument("--stats-dir", help="folder of cached statistics, instead of the file's")
    options = parser.parse_args(arguments)
    hparams = load_hyperparams(options.hparams, **({"stats_dir": options.stats_dir} if options.stats_dir else {}))
    if not isinstance(hparams, SolverHyperParams):
        raise HyperParamsError(f"{hparams.alg_name} needs no statistics.")
    with process_group() as local_rank:
        on_gpus = torch.device(hparams.device).type == "cuda" if isinstance(hparams.device, str) else True
        device = f"cuda:{local_rank}" if on_gpus and local_rank is not None else hparams.device
        model, tok = load_model(hparams.model_name, hparams.dtype, device, hparams.model_parallel)
        view = MoELayerView(model)
        view.require(hparams.layers)
        layer_statistics(view, tok, hparams, hparams.layers, model_fingerprint(view))


if __name__ == "__main__":
    main()
