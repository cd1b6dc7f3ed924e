"""Statistics of the critical layers: from the cache where they are there, collected in one pass where not.

An interrupted run goes on where it was.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import CoverageWarning, DataError
from easyedit_moe.hparams import SolverHyperParams
from easyedit_moe.moe.layers import MoELayer, MoELayerView
from easyedit_moe.statistics.cache import StatisticsKey, load_moments, save_moments, statistics_folder
from easyedit_moe.statistics.checkpoint import MomentsCheckpoint
from easyedit_moe.statistics.corpus import GENERATED
from easyedit_moe.statistics.distributed import least_over_processes, rank_and_size
from easyedit_moe.statistics.generated import GeneratedTexts, GenerationKey, opening_ids
from easyedit_moe.statistics.known_corpus import CorpusBounds, KnownCorpus
from easyedit_moe.statistics.moments import LayerMoments, Shards, collect_moments
from easyedit_moe.statistics.protected import mixed, of_protected
from easyedit_moe.statistics.token_cache import TokenisedTexts, TokenKey, tokenizer_hash
from easyedit_moe.storage.files import check_writable
from easyedit_moe.storage.strict_json import digest
from easyedit_moe.storage.tensors import read_or_warn

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
    """Moments of ``layers`` on ``hparams.mom2_dataset``, cached under ``hparams.stats_dir``; with those of
    ``protected_dataset``, which are cached apart, mixed into them (`easyedit_moe.statistics.protected.mixed`).

    Where torch.distributed was initialised, all of its processes must call this, and all return the same.

    What was found of a corpus is kept, too (`easyedit_moe.statistics.known_corpus`): where its statistics are cached,
    it is not read.

    Warns `CoverageWarning` about experts that too few tokens reached, and `CorpusNotComparedWarning` about a dataset
    that is taken to be what it was, since the hub can't be asked.

    Raises:
        DataError: the corpus can't be read, changed meanwhile, or is another one in another process.
            HyperParamsError: no room for generated texts. CacheError: a cached file is of another model; one that is
            damaged is made anew, with a warning. WriteError: nothing can be written under ``hparams.stats_dir``.
    """
    moments = _with_protected(hparams, lambda hp: _cached_statistics(view, tok, hp, layers, fingerprint, progress))
    _report_coverage(moments, hparams)
    return moments


def _with_protected(
    hparams: SolverHyperParams, collect: Callable[[SolverHyperParams], dict[int, LayerMoments]]
) -> dict[int, LayerMoments]:
    """What ``collect`` finds with these hparams, with what it finds of the protected texts."""
    protected = {} if hparams.protected_dataset is None else collect(of_protected(hparams))
    moments = collect(hparams)
    for layer in protected:
        moments[layer] = mixed(moments[layer], protected[layer], hparams.protected_share)
    return moments


def _cached_statistics(
    view: MoELayerView,
    tok: PreTrainedTokenizerBase,
    hparams: SolverHyperParams,
    layers: Sequence[int],
    fingerprint: str,
    progress: bool,
) -> dict[int, LayerMoments]:
    """Moments on ``hparams.mom2_dataset``, of files where they are there."""
    folder = statistics_folder(hparams.stats_dir, hparams.model_name, fingerprint)
    corpus = _corpus(view, tok, hparams, fingerprint, folder)
    cut, dtype, target = hparams.max_length, hparams.mom2_dtype, hparams.coverage_target
    keys = {
        n: StatisticsKey(fingerprint, n, corpus.name, corpus.tokens, corpus.n_samples, cut, dtype, target, view.site)
        for n in layers
    }
    found = {n: _cached(folder / key.file_name(), key, view.layers[n]) for n, key in keys.items()}
    # What is missing on one process is collected by all.
    there = {layer: bool(least_over_processes(int(one is not None))) for layer, one in found.items()}
    moments = {
        layer: _on_device_of(view.layers[layer], one)
        for layer, one in found.items()
        if one is not None and there[layer]
    }
    missing = [layer for layer in layers if not there[layer]]
    if missing:
        check_writable(folder / keys[missing[0]].file_name())
        checkpoint = MomentsCheckpoint(folder, {layer: keys[layer] for layer in missing}, CHECKPOINT_SECONDS)
        parts = corpus.parts()
        collected = _collected(view, tok, hparams, missing, parts, progress, checkpoint)
        if rank_and_size()[0] == 0:
            for layer, value in collected.items():
                save_moments(folder / keys[layer].file_name(), keys[layer], value)
            if isinstance(parts, TokenisedTexts):
                parts.keep()
        least_over_processes(0)  # no process goes on before the files are there
        checkpoint.remove()
        moments.update(collected)
    return {layer: moments[layer] for layer in layers}


def fresh_statistics(
    view: MoELayerView,
    tok: PreTrainedTokenizerBase,
    hparams: SolverHyperParams,
    layers: Sequence[int],
    fingerprint: str,
    progress: bool = True,
) -> dict[int, LayerMoments]:
    """Moments of ``layers`` of the model as it is, edits included: neither read from a cache nor kept (what is found of
    the corpus itself is both).

    The texts are those of `layer_statistics` (generated ones: of the unedited model, whose fingerprint this is), and so
    are the errors.
    """
    folder = statistics_folder(hparams.stats_dir, hparams.model_name, fingerprint)

    def collect(hp: SolverHyperParams) -> dict[int, LayerMoments]:
        return _collected(view, tok, hp, list(layers), _corpus(view, tok, hp, fingerprint, folder).parts(), progress)

    moments = _with_protected(hparams, collect)
    _report_coverage(moments, hparams)
    return moments


def _collected(
    view: MoELayerView,
    tok: PreTrainedTokenizerBase,
    hparams: SolverHyperParams,
    layers: list[int],
    parts: Shards,
    progress: bool,
    checkpoint: MomentsCheckpoint | None = None,
) -> dict[int, LayerMoments]:
    """Moments as the hparams want them; of several processes the first shows progress."""
    return collect_moments(
        view, tok, parts, layers, hparams.max_length, getattr(torch, hparams.mom2_dtype),
        progress=progress and rank_and_size()[0] == 0, coverage_target=hparams.coverage_target, checkpoint=checkpoint,
    )  # fmt: skip


def _cached(path: Path, key: StatisticsKey, moe: MoELayer) -> LayerMoments | None:
    return read_or_warn(path, partial(load_moments, key=key, layout=moe.experts.layout))


@dataclass(frozen=True)
class _Corpus:
    """Texts, and what a file of statistics says of them: their name or hash, how they are cut, how many they are.

    ``parts`` reads the texts, if that was not needed to find them.
    """

    parts: Callable[[], Shards]
    name: str
    tokens: str
    n_samples: int


def _corpus(
    view: MoELayerView, tok: PreTrainedTokenizerBase, hparams: SolverHyperParams, fingerprint: str, folder: Path
) -> _Corpus:
    n_samples, cut = hparams.mom2_n_samples, hparams.max_length
    if hparams.mom2_dataset == GENERATED:
        openings = opening_ids(tok, hparams.generated_openings)
        key = GenerationKey(fingerprint, openings, min(cut, hparams.generated_length), hparams.generated_seed)
        made = GeneratedTexts(view.model, tok, key, n_samples, folder)
        return _Corpus(lambda: made, key.folder_name(), digest(openings), n_samples)
    bounds = CorpusBounds(n_samples, hparams.mom2_n_tokens, cut)
    found = KnownCorpus(tok, hparams.mom2_dataset, bounds, hparams.stats_dir)

    def parts() -> Shards:
        token_key = TokenKey(found.name, tokenizer_hash(tok, found.tokens), cut)
        return TokenisedTexts(tok, found.texts(), token_key, token_key.file(hparams.stats_dir), found.known)

    _check_agreed(hparams.mom2_dataset, [found.name, found.tokens, found.count])
    return _Corpus(parts, found.name, found.tokens, found.count)


def _check_agreed(source: str, what: list[Any]) -> None:
    """Refuse processes of one run that found different texts: their sums would be of no corpus at all."""
    number = int(digest(what)[:15], 16)
    least, most = least_over_processes(number), -least_over_processes(-number)
    if least != most:
        raise DataError(
            f"The processes of this run found different texts in the corpus {source}: its files are not the same "
            "everywhere, it changed, or not all of them could ask the hub. Start again when they can."
        )


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
