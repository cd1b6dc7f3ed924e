"""A patch's factors as an adapter for a server."""

from __future__ import annotations

from collections.abc import Sequence

from easyedit_moe.checkpoints.naming import CheckpointNames
from easyedit_moe.errors import PatchError
from easyedit_moe.moe.config import text_config
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.serving.adapter_files import adapter_config
from easyedit_moe.serving.factors import LayerFactors
from easyedit_moe.serving.forms import expert_tensors, packed_tensors
from easyedit_moe.serving.naming import checkpoint_names
from easyedit_moe.serving.peft_adapter import ServedAdapter
from easyedit_moe.serving.servers import PACKED, Server

_MODULES = ("gate_proj", "up_proj", "down_proj")
"""What SGLang wants as ``target_modules``, whatever the checkpoint calls them; vLLM does not look at the list."""


def for_server(
    server: Server,
    layers: Sequence[LayerFactors],
    rank: int,
    base: str,
    names: CheckpointNames,
    architecture: str,
    peft_version: str,
) -> ServedAdapter:
    """An adapter in the one form that a server reads for a class of models, under the checkpoint's names.

    Of a layer that is touched it holds every expert and every projection; what is not edited is zero.

    Args:
        server: whose description is followed.
        layers: the update.
        rank: of every pair.
        base: name or folder of the checkpoint.
        names: of its tensors.
        architecture: class that its config.json names.
        peft_version: what the configuration says.

    Raises:
        PatchError: a rank that the server does not serve, experts without gates where it needs them, or an update of
            a shared expert or a dense FFN.
    """
    if any(factors.stored.single for factors in layers):
        raise PatchError(
            f"The patch changes {layers[0].stored.parameter_of(0)}, which is no routed expert, and how {server.name} "
            "reads an adapter of it is not known here. Give --to peft, or write a merged checkpoint with easyedit-moe "
            "apply."
        )
    reserved = server.reserved_rank(rank)
    called = [checkpoint_names(names, factors.stored) for factors in layers]
    if server.needs_gates and any(len(one.inputs) < 2 for one in called):
        raise PatchError(
            f"{server.name} {server.version} reads no adapter of experts without a gate projection, as "
            f"{architecture or 'this model'} has them. Write a merged checkpoint with easyedit-moe apply."
        )
    form = server.form_of(architecture)
    if form == PACKED:
        tensors = packed_tensors(layers, called, rank, with_inputs=True)
        # PEFT reads the same file, where it knows the parameters.
        parameters = [
            f"{factors.stored.name}.{name}"
            for factors in layers
            for name in ("gate_up_proj", "up_proj", "down_proj")
            if f"{factors.stored.name}.{name}" in names.parameters
        ]
        config = adapter_config(base, rank, peft_version, parameters=parameters)
    else:
        tensors = expert_tensors(layers, called, rank, whole=True)
        config = adapter_config(base, rank, peft_version, _MODULES)
    found, first = MoELayerView(names.model, without_weights=True).layers, layers[0]
    count = int(text_config(names.model).num_hidden_layers) if server.every_layer else len(found)
    slot = server.slot_bytes(form, count, first.stored.experts, first.d_model, first.d_hidden, reserved)
    command = server.command(base, "{adapter}", reserved)
    return ServedAdapter(tensors, config, form, f"{server.name} {server.version}", command, slot)
