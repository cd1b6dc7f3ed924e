"""A plain FFN as the one expert of a layer: the shared expert beside the routed ones, or the FFN of a dense layer."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch import Tensor, nn

from easyedit_moe.errors import LayoutError
from easyedit_moe.hparams.sites import DENSE, SHARED_EXPERT
from easyedit_moe.moe.experts import ExpertLayout, Experts, float_linear

_UPS_OF = {
    "down_proj": ("up_proj", "gate_proj", "gate_up_proj"),
    "w2": ("w1", "w3"),
    "output_linear": ("input_linear",),
}
"""Name of a down-projection -> names of what comes before it in the same module."""


class FFNExpert(Experts):
    """One FFN with its own down-projection ``nn.Linear``; E = 1.

    Its gate is 1 where its output is read by the layer itself (``sum_in_block`` is False). Inside a MoE block it is
    whatever the block multiplies it with, and its gated output is part of the block's.
    """

    def __init__(self, module: nn.Module, name: str, down_name: str, sum_in_block: bool) -> None:
        self.module, self.name, self.down_name, self.sum_in_block = module, name, down_name, sum_in_block
        weight, bias = self.down.weight, self.down.bias
        d_model, d_hidden = weight.shape
        # One matrix is all experts' below one another.
        self.layout = ExpertLayout(1, d_model, d_hidden, False, bias is not None, True, "packed", weight.dtype)

    @property
    def down(self) -> nn.Linear:
        """The down-projection.

        Raises:
            LayoutError: it carries an adapter, or is quantised.
        """
        return float_linear(self.module.get_submodule(self.down_name), f"{self.name}: the weights of {self.down_name}")

    def expert_key(self, x: Tensor, expert: int) -> Tensor:
        """As `Experts.expert_key`; the module is run, and what comes to its down-projection is the key."""
        caught: list[Tensor] = []
        hook = self.down.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        try:
            with torch.no_grad():
                self.module.forward(x)  # not through __call__, whose hooks may be those that read it
        finally:
            hook.remove()
        width = self.layout.d_hidden
        if [(key.shape[-1], key.numel()) for key in caught] != [(width, len(x) * width)]:
            raise LayoutError(
                f"{self.name} ({type(self.module).__name__}) does not give its {self.down_name} one key per token, so "
                "its keys can't be read. Please report the model's class."
            )
        return caught[0].reshape(len(x), -1)

    def expert_bias(self, expert: int) -> Tensor | None:
        """As `Experts.expert_bias`."""
        return self.down.bias

    def read(self, expert: int) -> Tensor:
        """As `Experts.read`."""
        return self.down.weight.data

    def parameters_of(self, expert: int) -> tuple[str, nn.Parameter]:
        """As `Experts.parameters_of`."""
        return f"{self.down_name}.weight", self.module.get_parameter(f"{self.down_name}.weight")


def down_projections(layer: nn.Module, name: str, without: Collection[str]) -> dict[str, list[tuple[str, str]]]:
    """Site -> path and name of the down-projection of every plain FFN in a decoder layer.

    A shared expert is known by its name, as it is by nothing else.

    Args:
        layer: of which the modules are searched.
        name: its path.
        without: paths of modules that are none, whatever is in them: the routed experts, and what text never reaches.
    """
    found: dict[str, list[tuple[str, str]]] = {SHARED_EXPERT: [], DENSE: []}
    for path, module in layer.named_modules(prefix=name):
        if any(path == other or path.startswith(f"{other}.") for other in without):
            continue
        children = dict(module.named_children())
        downs = [down for down, ups in _UPS_OF.items() if down in children and any(up in children for up in ups)]
        if len(downs) == 1:
            words = set(re.split(r"[._]", path[len(name) :]))
            found[SHARED_EXPERT if words & {"share", "shared"} else DENSE].append((path, downs[0]))
    return found
