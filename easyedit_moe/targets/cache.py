"""Target vectors on disk, one file per request, under a key that says at which weights they were found."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyedit_moe.errors import CacheError, DamagedCacheError
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.hparams.sites import site_entry
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.statistics.cache import statistics_folder
from easyedit_moe.storage.checksums import checksum
from easyedit_moe.storage.tensors import digest, read_or_warn, read_safetensors, write_safetensors
from easyedit_moe.targets.search import TargetSearch, TargetVectors, fact_contexts, warn_of_targets

SCHEMA = 1
_FIELDS = ("delta", "initial_nll", "final_nll", "reached", "steps", "known")


def weights_hash(view: MoELayerView) -> str:
    """SHA-256 over checksums of every parameter, each of which reads all of its bits; any edit changes it.

    Parameters that are offloaded can't be read, nor edited.
    """
    state = hashlib.sha256()
    for name, parameter in view.model.named_parameters():
        if parameter.is_meta:
            continue
        state.update(f"{name}{checksum(parameter.detach())};".encode())
    return state.hexdigest()


def cached_targets(
    folder: str | Path, model_name: str, fingerprint: str, search: TargetSearch, requests: Sequence[EditRequest]
) -> TargetVectors:
    """As `TargetSearch.targets`, but what lies in ``folder`` is read, not found anew.

    What is found is written as soon as its chunk is done, so that an interrupted search goes on.

    Raises:
        CacheError: a file of something else (one that is damaged is made anew, with a warning); what
            `TargetSearch.targets` raises.
    """
    place = statistics_folder(folder, model_name, fingerprint) / weights_hash(search.view)[:16]
    keys = [_key(fingerprint, place.name, search, request) for request in requests]
    paths = [place / f"target-{digest(key)[:24]}.safetensors" for key in keys]
    rows: dict[int, dict[str, Tensor]] = {}
    for i, (path, key) in enumerate(zip(paths, keys, strict=True)):
        read = read_or_warn(path, partial(_read, key=key))
        if read is not None:
            rows[i] = read
    missing = [i for i in range(len(requests)) if i not in rows]

    def keep(numbers: Sequence[int], found: TargetVectors) -> None:
        for row, number in enumerate(numbers):
            i = missing[number]
            rows[i] = {name: getattr(found, name)[row] for name in _FIELDS}
            write_safetensors(paths[i], rows[i], {"schema": SCHEMA, "kind": "target", "key": keys[i]})

    if missing:
        search.find([requests[i] for i in missing], keep)
    targets = TargetVectors(*(torch.stack([rows[i][name] for i in range(len(requests))]) for name in _FIELDS))
    if search.warn:
        warn_of_targets(requests, targets)
    return targets


def _key(fingerprint: str, weights: str, search: TargetSearch, request: EditRequest) -> dict[str, Any]:
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
        **site_entry(search.view.site),
    }


def _read(path: Path, key: dict[str, Any]) -> dict[str, Tensor]:
    advice = "delete it, and the target is found anew"
    tensors, metadata = read_safetensors(path, DamagedCacheError, advice)
    if metadata.get("kind") != "target" or metadata.get("schema") != SCHEMA or metadata.get("key") != key:
        raise CacheError(f"{path} is not the target of this request at these weights and settings; {advice}.")
    tensors.setdefault("known", torch.tensor(False))  # earlier versions did not note it, and warned of nothing then
    if set(tensors) != set(_FIELDS) or not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise DamagedCacheError(f"{path} holds an incomplete or non-finite target; {advice}.")
    return tensors
