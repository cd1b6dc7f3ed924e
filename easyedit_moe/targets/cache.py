"""Target vectors on disk, one file per request, under a key that says at which weights they were found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import CacheError, DamagedCacheError
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.hparams.sites import site_entry
from easyedit_moe.moe.config import text_config
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.statistics.cache import statistics_folder
from easyedit_moe.storage.checksums import checksum, checksums_of
from easyedit_moe.storage.files import check_writable
from easyedit_moe.storage.schema import Expected, check_tensors, content_of, read_record
from easyedit_moe.storage.strict_json import digest
from easyedit_moe.storage.tensors import read_or_warn, read_safetensors, write_safetensors
from easyedit_moe.targets.search import TargetSearch, TargetSettings, TargetVectors, fact_contexts, warn_of_targets

SCHEMA = 1
_ADVICE = "delete it, and the target is found anew"
_FIELDS = {
    "delta": (torch.float32,), "initial_nll": (torch.float32,), "final_nll": (torch.float32,),
    "reached": (torch.bool,), "steps": (torch.int64,), "known": (torch.bool,), "batch": (torch.int64,),
}  # fmt: skip
"""Tensors of a file, by the fields of `TargetVectors`, and their dtypes."""


def weights_hash(view: MoELayerView) -> str:
    """SHA-256 over checksums of every parameter, each of which reads all of its bits; any edit changes it.

    Parameters that are offloaded can't be read, nor edited.
    """
    there = {name: p.detach() for name, p in view.model.named_parameters() if not p.is_meta}
    state = hashlib.sha256()
    for name, value in zip(there, checksums_of(list(there.values())), strict=True):
        state.update(f"{name}{value};".encode())
    return state.hexdigest()


def cached_targets(
    folder: str | Path,
    model_name: str,
    fingerprint: str,
    search: TargetSearch,
    requests: Sequence[EditRequest],
    beside: Sequence[Sequence[EditRequest]] = (),
    first: Sequence[Tensor | None] = (),
) -> TargetVectors:
    """As `TargetSearch.targets`, but what lies in ``folder`` is read, not found anew.

    ``beside`` and ``first`` are those of `TargetSearch.find`.

    What is found is written as soon as its chunk is done, so that an interrupted search goes on. A target that was
    found in other company is not bit-equal to one that is found now (see `TargetVectors.batch`, which is kept with it).

    Raises:
        CacheError: a file of something else (one that is damaged is made anew, with a warning); what
            `TargetSearch.targets` raises. WriteError: nothing can be written to ``folder``.
    """
    place = statistics_folder(folder, model_name, fingerprint) / weights_hash(search.view)[:16]
    others = beside or [()] * len(requests)
    origins = first or [None] * len(requests)
    keys = [
        _key(fingerprint, place.name, search, request, more) | _start(one)
        for request, more, one in zip(requests, others, origins, strict=True)
    ]
    paths = [place / f"target-{digest(key)[:24]}.safetensors" for key in keys]
    width: int | str = getattr(text_config(search.view.model), "hidden_size", None) or "d"
    rows: dict[int, dict[str, Tensor]] = {}
    for i, (path, key) in enumerate(zip(paths, keys, strict=True)):
        read = read_or_warn(path, partial(_read, key=key, width=width))
        if read is not None:
            rows[i] = read
    missing = [i for i in range(len(requests)) if i not in rows]

    def keep(numbers: Sequence[int], found: TargetVectors) -> None:
        for row, number in enumerate(numbers):
            i = missing[number]
            rows[i] = {name: getattr(found, name)[row] for name in _FIELDS}
            write_safetensors(paths[i], rows[i], {"schema": SCHEMA, "kind": "target", "key": keys[i]})

    if missing:
        check_writable(paths[missing[0]])
        more: dict[str, Any] = {"beside": [others[i] for i in missing]} if beside else {}
        more |= {"first": [origins[i] for i in missing]} if first else {}
        search.find([requests[i] for i in missing], keep, **more)
    targets = TargetVectors(*(torch.stack([rows[i][name] for i in range(len(requests))]) for name in _FIELDS))
    if search.warn:
        warn_of_targets(requests, targets)
    return targets


def found_targets(
    hparams: Any,
    settings: tuple[int, tuple[str, ...], TargetSettings],
    view: MoELayerView,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    progress: bool = True,
    fingerprint: str | None = None,
    **more: Any,
) -> TargetVectors:
    """Targets at a model's weights by a method's `Editor.target_settings`: read where they lie in the hparams'
    ``target_cache_dir``, else found. ``fingerprint`` is the `model_fingerprint`, where it is known; ``more`` is as for
    `TargetSearch.find`. Missed targets are not warned of; raises as `cached_targets` does.
    """
    search = TargetSearch(view, tok, *settings, progress, warn=False)
    folder = getattr(hparams, "target_cache_dir", None)
    if folder is None:
        return search.targets(requests, **more)
    known = fingerprint or model_fingerprint(view)
    return cached_targets(folder, hparams.model_name, known, search, requests, **more)


def _key(
    fingerprint: str, weights: str, search: TargetSearch, request: EditRequest, beside: Sequence[EditRequest]
) -> dict[str, Any]:
    settings = search.settings
    # Without a chat the key is what it was before there were chats, so that what is cached stays.
    left_out = {"batch_size"} if settings.chat else {"batch_size", "chat"}
    kept = {name: value for name, value in asdict(settings).items() if name not in left_out}
    found = fact_contexts(search.tok, request, search.prefixes, settings.fact_token, settings.chat)
    return {
        "fingerprint": fingerprint,
        "weights": weights,
        "layer": search.layer,
        "settings": kept,
        "subject": request.subject,
        "contexts": [[*context.ids, context.fact] for context in found],
        "target": list(found[0].answer),
        **({"sum beside": [[one.prompt, one.target_new] for one in beside]} if beside else {}),
        **site_entry(search.view.site),
    }


def _start(first: Tensor | None) -> dict[str, Any]:
    return {} if first is None else {"first": checksum(first)}


@dataclass(frozen=True)
class _Described:
    schema: Literal[1]
    kind: Literal["target"]
    key: dict[str, Any]


def _read(path: Path, key: dict[str, Any], width: int | str) -> dict[str, Tensor]:
    tensors, metadata = read_safetensors(path, DamagedCacheError, _ADVICE)
    with content_of(path, DamagedCacheError, _ADVICE):
        described = read_record(metadata, _Described)
        # Earlier versions noted neither, and warned of nothing.
        tensors.setdefault("known", torch.tensor(False))
        tensors.setdefault("batch", torch.tensor(-1))
        check_tensors(
            tensors, {name: Expected((width,) if name == "delta" else (), dtypes) for name, dtypes in _FIELDS.items()}
        )
        if int(tensors["steps"]) < 0:
            raise ValueError(f"steps is {int(tensors['steps'])}")
    if json.dumps(described.key, sort_keys=True) != json.dumps(key, sort_keys=True):
        raise CacheError(f"{path} is not the target of this request at these weights and settings; {_ADVICE}.")
    return tensors
