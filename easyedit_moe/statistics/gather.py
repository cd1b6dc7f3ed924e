"""Statistics of the critical layers: from the cache where they are there, collected in one pass where not.

An interrupted run goes on where it was.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import CoverageWarning
from easyedit_moe.facts.tokens import encode_text
from easyedit_moe.hparams import SolverHyperParams
from easyedit_moe.moe.layers import MoELayer, MoELayerView
from easyedit_moe.statistics.cache import StatisticsKey, load_moments, save_moments, statistics_folder
from easyedit_moe.statistics.checkpoint import MomentsCheckpoint
from easyedit_moe.statistics.corpus import GENERATED, corpus_hash, iterate_texts, load_texts, source_stamp
from easyedit_moe.statistics.distributed import least_over_processes, rank_and_size
from easyedit_moe.statistics.generated import GeneratedTexts, GenerationKey, opening_ids
from easyedit_moe.statistics.moments import LayerMoments, Shards, collect_moments, encode_cut
from easyedit_moe.statistics.protected import mixed, of_protected
from easyedit_moe.statistics.token_cache import TokenisedTexts, TokenKey, tokenizer_hash
from easyedit_moe.storage.files import check_writable
from easyedit_moe.storage.strict_json import digest
from easyedit_moe.storage.tensors import read_or_warn

logger = logging.getLogger(__name__)

_FIRST_TEXTS = 8
_HASHED: dict[tuple[Any, ...], tuple[str, int]] = {}
"""Hash and number of texts of each corpus of files that this process has read, as its files were then."""

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

    Warns `CoverageWarning` about experts that too few tokens reached.

    Raises:
        DataError: the corpus can't be read. HyperParamsError: no room for generated texts. CacheError: a cached
            file is of another model; one that is damaged is made anew, with a warning. WriteError: nothing can be
            written under ``hparams.stats_dir``.
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
    """Moments of ``layers`` of the model as it is, edits included: neither read from a cache nor kept.

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

    ``parts`` reads the texts, if that was not needed before.
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
    source, known = hparams.mom2_dataset, list[list[int]]()
    stamp = source_stamp(source) if hparams.mom2_n_tokens is None else None
    if stamp is not None and (stamp, n_samples) in _HASHED:
        texts = None
        first = load_texts(source, min(n_samples, _FIRST_TEXTS))
        name, count = _HASHED[stamp, n_samples]
    else:
        if hparams.mom2_n_tokens is None:
            texts = load_texts(source, n_samples)
        else:
            with closing(iterate_texts(source)) as found:
                texts = load_texts(_up_to(hparams.mom2_n_tokens, islice(found, n_samples), tok, cut, known))
        first, name, count = texts[:_FIRST_TEXTS], corpus_hash(texts), len(texts)
        if stamp is not None:
            _HASHED[stamp, n_samples] = name, count
    # Another tokenizer, or other special tokens, shows on the first few texts already.
    tokens = corpus_hash([str(encode_text(tok, text)) for text in first])

    def parts() -> Shards:
        token_key = TokenKey(name, tokenizer_hash(tok, tokens), cut)
        read = load_texts(source, n_samples) if texts is None else texts
        return TokenisedTexts(tok, read, token_key, token_key.file(hparams.stats_dir), known)

    return _Corpus(parts, name, tokens, count)


def _up_to(
    n_tokens: int, texts: Iterable[str], tok: PreTrainedTokenizerBase, cut: int, known: list[list[int]]
) -> Iterator[str]:
    """Texts until they have that many tokens; their ids are added to ``known``."""
    for text in texts:
        yield text
        known.append(encode_cut(tok, text, cut))
        n_tokens -= len(known[-1])
        if n_tokens <= 0:
            return


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
