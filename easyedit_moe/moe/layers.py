"""The layers of a causal language model that hold a site: where they are, and which may be edited."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from easyedit_moe.errors import DenseModelError, LayerError, LayoutError, offloaded
from easyedit_moe.hparams.sites import CALLED, EXPERTS
from easyedit_moe.moe.experts import Experts, ModuleListExperts
from easyedit_moe.moe.ffn_experts import FFNExpert, down_projections
from easyedit_moe.moe.other_experts import find_any_experts


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer, dense or not.

    Attributes:
        index: among all decoder layers, dense ones included.
        name: path of the decoder layer in the model.
        layer: the decoder layer, whose output is the residual stream.
    """

    index: int
    name: str
    layer: nn.Module


@dataclass(frozen=True)
class MoELayer(DecoderLayer):
    """One decoder layer with experts, or with another site, which counts as one expert.

    Attributes:
        block: the module that calls the router and the experts (the decoder layer itself in some families); of a plain
            FFN that the layer itself calls, the FFN.
        experts: what is edited: its routed experts, its shared expert or its dense FFN.
        experts_name: path of the module that holds them in the model.
    """

    block: nn.Module
    experts: Experts
    experts_name: str

    @property
    def output_site(self) -> nn.Module:
        """The module whose output is the MoE block's output: the block, or the experts where the layer is the block."""
        return self.experts.module if self.block is self.layer else self.block

    @property
    def sum_site(self) -> nn.Module:
        """The module in whose output the gated sum over experts appears first."""
        return self.block if self.experts.sum_in_block else self.experts.module

    def parameter_names(self) -> list[str]:
        """Full names of the parameters that hold this layer's down-projections."""
        return [f"{self.experts_name}.{name}" for name, _ in self.experts.parameters()]


class MoELayerView:
    """All layers of a model that hold one site, found by walking its decoder.

    Layers may lie on several devices, and those that are not edited may be offloaded.

    Args:
        model: a causal language model of transformers.
        without_weights: let `require` accept layers on the meta device, which can be described, not edited.
        site: one of `easyedit_moe.hparams.sites.SITES`.

    Attributes:
        layers: by index, those that hold the site.
        routed: by index, those with routed experts; the same as ``layers`` where these are the site.

    Raises:
        DenseModelError: no MoE layer at all. LayoutError, QuantizedExpertsError: experts that can't be edited.
    """

    def __init__(self, model: nn.Module, without_weights: bool = False, site: str = EXPERTS) -> None:
        self.model, self.without_weights, self.site = model, without_weights, site
        self.decoder_layers, self.stack_name = decoder_stack(model)
        self.routed: dict[int, MoELayer] = {}
        for index, layer in enumerate(self.decoder_layers):
            found = _experts_of_layer(model, layer, f"{self.stack_name}.{index}", index, True)
            if found is not None:
                self.routed[index] = found
        if not self.routed:
            _refuse_unknown_experts(self.stack_name, self.decoder_layers)
            raise DenseModelError(
                f"{type(model).__name__} has {len(self.decoder_layers)} decoder layers and no experts in any of them. "
                "This package edits Mixture-of-Experts models; use EasyEdit's own editors for a dense one."
            )
        self.layers = self.routed if site == EXPERTS else self._other_site()

    def _other_site(self) -> dict[int, MoELayer]:
        """The layers with exactly one FFN of the site."""
        found = {}
        for index, layer in enumerate(self.decoder_layers):
            name = f"{self.stack_name}.{index}"
            moe = self.routed.get(index)
            paths = self._ffns(index)
            if len(paths) == 1:
                found[index] = _ffn_of_layer(self.model, layer, name, index, moe, *paths[0])
        return found

    def _ffns(self, index: int) -> list[tuple[str, str]]:
        """Path and down-projection of the FFNs of the site in one layer."""
        layer, name = self.decoder_layers[index], f"{self.stack_name}.{index}"
        without = [path for path, _ in layer.named_modules(prefix=name) if _is_of_other_senses(path[len(name) :])]
        if index in self.routed:
            without.append(self.routed[index].experts_name)
        return down_projections(layer, name, without)[self.site]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers, dense ones included."""
        return len(self.decoder_layers)

    def require(self, layers: Sequence[int]) -> list[MoELayer]:
        """The MoE layers with these indices.

        Raises:
            LayerError: empty, not strictly increasing, out of range or without the site. LayoutError: offloaded
                weights.
        """
        self._check_indices(layers)
        lacking = [i for i in layers if i not in self.layers]
        if lacking:
            raise LayerError(self._lacking(lacking))
        chosen = [self.layers[i] for i in layers]
        self._check_weights(chosen)
        return chosen

    def decoder(self, layers: Sequence[int]) -> list[DecoderLayer]:
        """The decoder layers with these indices, each a `MoELayer` where it has routed experts.

        Raises:
            LayerError: empty, not strictly increasing or out of range. LayoutError: offloaded experts.
        """
        self._check_indices(layers)
        self._check_weights([self.routed[i] for i in layers if i in self.routed])
        return [self.routed.get(i) or DecoderLayer(i, f"{self.stack_name}.{i}", self.decoder_layers[i]) for i in layers]

    def _check_indices(self, layers: Sequence[int]) -> None:
        if not layers:
            raise LayerError("layers is empty; name at least one layer.")
        if any(isinstance(i, bool) or not isinstance(i, int) for i in layers):
            raise LayerError(f"layers must be whole numbers; found {list(layers)}.")
        if any(b <= a for a, b in pairwise(layers)):
            raise LayerError(f"layers must be strictly increasing; found {list(layers)}.")
        outside = [i for i in layers if not 0 <= i < self.num_layers]
        if outside:
            raise LayerError(f"layers {outside} are out of range: the model has layers 0 to {self.num_layers - 1}.")

    def _check_weights(self, layers: Sequence[MoELayer]) -> None:
        for moe in layers if not self.without_weights else []:
            if any(parameter.is_meta for _, parameter in moe.experts.parameters()):
                raise offloaded(moe.experts_name)

    def _lacking(self, layers: Sequence[int]) -> str:
        """What is said of layers without the site."""
        if self.site == EXPERTS:
            return f"layers {list(layers)} are dense; the MoE layers of this model are {sorted(self.layers)}."
        called, known = CALLED[self.site], sorted(self.layers)
        several = [path for path, _ in self._ffns(layers[0])]
        if several:
            return f"layer {layers[0]} has several {called}s ({', '.join(several)}); which to edit is ambiguous."
        where = f"the layers of this model that have one are {known}" if known else "no layer of this model has one"
        return (
            f"layers {list(layers)} have no {called} with a plain down-projection (site: {self.site}); {where}. Choose "
            "layers that have it, or another site."
        )


def has_experts(model: nn.Module) -> bool:
    """Whether a model is a MoE model; not whether it can be edited.

    Raises:
        LayoutError: experts that can't be read, or no decoder.
    """
    try:
        MoELayerView(model)
    except DenseModelError:
        return False
    return True


def _refuse_unknown_experts(stack_name: str, layers: nn.ModuleList) -> None:
    """LayoutError if modules that were not recognised call themselves experts: the model is hardly dense then."""
    for name, module in layers.named_modules(prefix=stack_name):
        if isinstance(getattr(module, "num_experts", None), int) and isinstance(
            getattr(module, "up_embed", None), nn.Embedding
        ):
            raise LayoutError(
                f"{name} ({type(module).__name__}) keeps each expert as one row of an embedding and mixes the "
                "routing of all tokens of a forward, so a fact's experts depend on what else is in the batch: no edit "
                "of them would be exact. MEMoE, whose adapter lies beside the FFN, does not need them."
            )
        if "expert" in name.rpartition(".")[2] or "expert" in type(module).__name__.lower():
            raise LayoutError(
                f"{name} ({type(module).__name__}) is named like experts, but its layout is unknown. Please report the "
                "model's class."
            )


def decoder_of(model: nn.Module) -> nn.Module | None:
    """What the model's ``get_decoder()`` returns; None where it has no such method, or one that returns no module."""
    if not hasattr(model, "get_decoder"):
        return None
    of_transformers: Any = model
    decoder = of_transformers.get_decoder()
    return decoder if isinstance(decoder, nn.Module) else None


def decoder_stack(model: nn.Module) -> tuple[nn.ModuleList, str]:
    """The ModuleList of decoder layers, and its path; behind a multimodal wrapper, that of the text decoder.

    Raises:
        LayoutError: no such list, or several; an encoder with a decoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise LayoutError(
            f"{type(model).__name__} is an encoder with a decoder: a prompt is read by one and answered by the other, "
            "so no fact token stands before its answer in one stack of layers. Use a decoder-only model."
        )
    names = {id(module): name for name, module in model.named_modules()}
    decoder = decoder_of(model)
    root = decoder if decoder is not None and id(decoder) in names else model
    prefix = names[id(root)]
    candidates = [
        (name, module)
        for name, module in root.named_modules(prefix=prefix)
        if isinstance(module, nn.ModuleList) and name.split(".")[-1] in ("layers", "h", "blocks", "layer")
    ]
    outermost = [
        (name, module)
        for name, module in candidates
        if not any(name.startswith(other + ".") for other, _ in candidates if other != name)
    ]
    if not outermost:
        raise LayoutError(
            f"{type(model).__name__} has no list of decoder layers named layers, h or blocks; this architecture is "
            "unknown."
        )
    if len(outermost) > 1:
        stacks = ", ".join(name for name, _ in outermost)
        raise LayoutError(
            f"{type(model).__name__} has several stacks of layers ({stacks}) and no get_decoder() that picks one."
        )
    name, module = outermost[0]
    return module, name


_OTHER_SENSES = {"vision", "visual", "image", "audio", "speech"}
"""Words in the paths of experts that text never reaches."""


def _is_of_other_senses(path: str) -> bool:
    return bool(_OTHER_SENSES & set(re.split(r"[._]", path)))


def _common_parent(paths: Sequence[str]) -> str:
    """The path of the innermost module that holds all of these."""
    parents = [path.split(".")[:-1] for path in paths]
    length = next((i for i, parts in enumerate(zip(*parents, strict=False)) if len(set(parts)) > 1), len(parents[0]))
    return ".".join(parents[0][:length])


def _experts_of_layer(
    model: nn.Module, layer: nn.Module, name: str, index: int, without_weights: bool
) -> MoELayer | None:
    found: list[tuple[str, Experts]] = []
    modules = dict(layer.named_modules(prefix=name))
    for path, module in modules.items():
        experts = find_any_experts(module, path, modules.get(path.rpartition(".")[0]), without_weights)
        if experts is not None:
            found.append((path, experts))
    if not found:
        return None
    block = model.get_submodule(_common_parent([path for path, _ in found]))
    of_text = [pair for pair in found if not _is_of_other_senses(pair[0][len(name) :])]
    if len(of_text) != 1:
        paths = ", ".join(path for path, _ in found)
        raise LayoutError(f"{name} has several collections of experts ({paths}); which one to edit is ambiguous.")
    path, experts = of_text[0]
    if block is layer and isinstance(experts, ModuleListExperts):
        raise LayoutError(
            f"{path} is a ModuleList in the decoder layer itself, without a MoE block around it, so its gates can't be "
            "read. Please report the model's class."
        )
    return MoELayer(index, name, layer, block, experts, path)


def _ffn_of_layer(
    model: nn.Module, layer: nn.Module, name: str, index: int, moe: MoELayer | None, path: str, down: str
) -> MoELayer:
    """A plain FFN as a layer's site; inside a MoE block its output is part of the block's.

    A block that normalises what it returns does more than multiply it with a gate: there the FFN's own output is what
    is followed, and all that the block does with it belongs to the tail.
    """
    module = model.get_submodule(path)
    block = module
    if moe is not None and moe.block is not layer and any(part is module for part in moe.block.modules()):
        normalises = any("Norm" in type(child).__name__ for child in moe.block.children())
        block = module if normalises else moe.block
    return MoELayer(index, name, layer, block, FFNExpert(module, path, down, block is not module), path)
