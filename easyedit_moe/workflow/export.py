"""``export``: a patch as an adapter that PEFT or a server loads on the unedited checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from math import exp
from pathlib import Path
from typing import TypeVar

import torch

from easyedit_moe.checkpoints.staging import check_free, new_folder
from easyedit_moe.errors import AdapterError, PatchError, did_you_mean
from easyedit_moe.evaluation.scoring import TargetScore, score_targets
from easyedit_moe.hparams import DTYPES
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.inspection import describe
from easyedit_moe.patches.tensors import TensorPatch
from easyedit_moe.patches.weights import WeightPatch, restore, writing
from easyedit_moe.serving.adapter_files import write_adapter
from easyedit_moe.serving.factors import LayerFactors, layer_factors
from easyedit_moe.serving.naming import checkpoint_names
from easyedit_moe.serving.peft_adapter import ServedAdapter, for_peft
from easyedit_moe.serving.server_adapter import for_server
from easyedit_moe.serving.servers import PACKED, PER_EXPERT, SERVERS, Server
from easyedit_moe.workflow.export_base import ExportBase
from easyedit_moe.workflow.export_report import Exported, ExportedFact, ExportedLayer, notes_of
from easyedit_moe.workflow.session import Loading, SavedPatch, applied, load, loading_options, read_patch

PEFT = "peft"
TARGETS = (PEFT, *SERVERS)
FORMS = (PACKED, PER_EXPERT)
_Value = TypeVar("_Value")


def export(
    patch: str | Path | SavedPatch,
    to: str = PEFT,
    out: str | Path | None = None,
    rank: int | None = None,
    model: str = "",
    form: str = "",
    dtype: str = "",
    peft_version: str = "",
    score: bool | None = None,
    loading: Loading | None = None,
    progress: bool = True,
) -> Exported:
    """Write a patch as a LoRA of the experts' down-projections, of the exact rank or cut off at a lower one.

    Args:
        patch: file, or a patch of factored updates that is not applied.
        to: "peft", "vllm" or "sglang".
        out: folder; absent or empty. By default ``adapter-<to>`` beside the patch's file.
        rank: largest rank of an expert (truncated SVD); by default nothing is cut off.
        model: the checkpoint on which the patch was made: its folder, a hub name that is in the cache, or "factworld";
            by default the name that the patch holds. Servers' names are those of its files.
        form: "packed" or "per-expert", for PEFT only; by default what fits the model in transformers 5.
        dtype: float32, bfloat16 or float16; by default that of the edited weights, to which every loader casts.
        peft_version: for which ``to="peft"`` writes; by default the installed one.
        score: score the patch's facts without it, with it and with the adapter, for which the model is loaded; by
            default where a rank is given.
        loading: how the model is loaded for that; see `easyedit_moe.workflow.session.loading_options`.
        progress: show progress bars.

    Raises:
        PatchError: no patch, one of whole tensors, one that changes nothing or does not fit the model, a rank, form or
            version that is not served. AdapterError: MEMoE's adapter. DataError: the model can't be read.
            CheckpointError: the folder is not empty, or the checkpoint's names can't be followed.
    """
    for name, value, known in (("to", to, TARGETS), ("form", form, ("", *FORMS)), ("dtype", dtype, ("", *DTYPES))):
        _check_choice(name, value, known)
    if to != PEFT and (form or peft_version):
        option = "--form" if form else "--peft-version"
        raise PatchError(f"A server reads one form of a model's experts, so {option} is for {PEFT} only.")
    read = _factored(read_patch(patch))
    folder = _out(patch, to, out)
    check_free(folder)
    layers = layer_factors(read, rank, getattr(torch, dtype) if dtype else None)
    base = ExportBase.of(read, model, loading is not None and loading.trust_remote_code)
    served = _served(layers, to, form, base, peft_version or version("peft"))
    facts: tuple[ExportedFact, ...] = ()
    if score if score is not None else rank is not None:
        base.needed("The facts are scored on the model")
        facts = _scored(read, layers, base.name, loading, progress)
    exported = Exported(
        folder=folder, target=to, checked=served.checked, form=served.form, rank=_rank(layers), dtype=_dtype(layers),
        layers=tuple(ExportedLayer(f.layer, len(f.experts), f.exact_rank, f.rank, f.loss) for f in layers),
        facts=facts, slot_bytes=served.slot_bytes, merged_bytes=_merged_bytes(read, layers),
        command=served.command.replace("{adapter}", str(folder)), remarks=_remarks(read, base, SERVERS.get(to)),
    )  # fmt: skip
    with new_folder(folder) as partial:
        write_adapter(partial, served.tensors, served.config, notes_of(exported, read))
    return exported


def _served(layers: Sequence[LayerFactors], to: str, form: str, base: ExportBase, peft_version: str) -> ServedAdapter:
    """The adapter for one target."""
    if to != PEFT:
        server = SERVERS[to]
        found = base.needed(f"The names of the tensors that {server.name} reads are those of the checkpoint")
        return for_server(server, layers, _rank(layers), base.name, found, base.architecture, peft_version)
    names = None
    if form == PER_EXPERT and base.names is not None:
        names = [checkpoint_names(base.names, factors.stored) for factors in layers]
    model_class = "AutoModelForCausalLM" if base.names is None else type(base.names.model).__name__
    return for_peft(layers, _rank(layers), base.name, peft_version, form, names, model_class)


def _dtype(layers: Sequence[LayerFactors]) -> str:
    return str(next(iter(layers[0].experts.values()))[0].dtype).removeprefix("torch.")


def _rank(layers: Sequence[LayerFactors]) -> int:
    """That of every pair of the adapter: servers read one rank."""
    return max(factors.rank for factors in layers)


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise PatchError(
            f"{name} must be one of {', '.join(filter(None, known))}; found {value!r}.{did_you_mean(value, known)}"
        )


def _factored(patch: SavedPatch) -> WeightPatch:
    if isinstance(patch, WeightPatch):
        return patch
    if isinstance(patch, TensorPatch):
        raise PatchError(
            f"The patch {patch.id} holds whole tensors, which are no low-rank update of down-projections, so it can't "
            "become an adapter. Write a merged checkpoint with easyedit-moe apply."
        )
    raise AdapterError(
        "MEMoE's adapter chooses by each prompt whether it answers, which no LoRA can do. Serve it with the loader "
        "that lies beside its checkpoint (edit --save checkpoint)."
    )


def _out(patch: str | Path | SavedPatch, to: str, out: str | Path | None) -> Path:
    if out is not None:
        return Path(out)
    if not isinstance(patch, (str, Path)):
        raise PatchError("out must name a folder for the adapter, since the patch is no file.")
    return Path(patch).parent / f"adapter-{to}"


def _merged_bytes(patch: WeightPatch, layers: Sequence[LayerFactors]) -> int:
    return sum(len(f.experts) * f.d_model * f.d_hidden * getattr(torch, patch.dtypes[f.layer]).itemsize for f in layers)


def _remarks(patch: WeightPatch, base: ExportBase, server: Server | None) -> tuple[str, ...]:
    found = []
    if patch.parent is not None and not base.compared:
        found.append(
            f"The patch was made on a model that holds the patch {patch.parent}: the adapter needs a base with it. Or "
            "merge both and export the result."
        )
    if base.names is not None and not base.compared:
        found.append("The checkpoint has another dtype than the patch, so their weights were not compared.")
    if base.quantised is not None:
        found.append(
            f"The base is stored as {base.quantised}. The edit was computed on its dequantised weights, which are what "
            "it means, so the adapter may lie on the quantised base."
        )
        if server is not None and not server.mxfp4 and base.quantised == "mxfp4":
            found.append(
                f"{server.name} {server.version} reads no adapter of experts that stay in MXFP4: serve a base in "
                "bfloat16, or a merged checkpoint (easyedit-moe apply)."
            )
    return tuple(found)


def _scored(
    patch: WeightPatch, layers: Sequence[LayerFactors], model: str, loading: Loading | None, progress: bool
) -> tuple[ExportedFact, ...]:
    """The patch's facts on the model without it, with it, and with the adapter's factors added to the weights."""
    pairs = [(str(fact["prompt"]), str(fact["target_new"])) for fact in describe(patch)["facts"]]
    if not pairs:
        return ()
    chat = any(settings.get("chat") for settings in describe(patch)["settings"])
    net, tok = load(model, loading_options(model, [patch], loading), progress)

    def scores() -> list[TargetScore]:
        return score_targets(net, tok, pairs, progress=progress, chat=chat)

    found = [scores()]
    with applied(net, tok, [patch]):
        found.append(scores())
    view = MoELayerView(net, site=patch.site)
    with writing(view) as writer:
        for factors in layers:
            writer.write(factors.layer, factors.update())
        try:
            found.append(scores())
        finally:
            restore(view, writer.originals)
    rows = zip(pairs, *found, strict=True)
    return tuple(
        ExportedFact(
            prompt, target, _three([exp(-s.nll * len(s.labels)) for s in each]), _three([s.exact for s in each])
        )
        for (prompt, target), *each in rows
    )


def _three(values: Sequence[_Value]) -> tuple[_Value, _Value, _Value]:
    first, second, third = values
    return first, second, third
