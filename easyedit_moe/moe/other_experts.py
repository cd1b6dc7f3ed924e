"""Experts outside transformers' protocol: recognised by shape and signature, and never relied on without a check.

- ``CalledExperts``: called as ``experts(hidden, index, weights)``, but without the protocol's flags.
- ``SortedInputExperts``: called with every token once per expert, times its gate (Llama 4).
- ``ParallelExperts``: two modules of one matrix per expert, and a router that says who goes where (JetMoE).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from easyedit_moe.errors import LayoutError
from easyedit_moe.interrupts import do_all
from easyedit_moe.moe.experts import (
    NORM_BEHIND,
    ExpertLayout,
    Experts,
    expert_matrix,
    find_experts,
    is_quantized,
    refuse_offloaded,
)

_PRODUCTS = ("linear", "matmul", "__matmul__", "bmm", "mm")


class _MeetsWeight(TorchFunctionMode):
    """Inside, products with a parameter are seen: what comes to it is kept, or zero is answered."""

    def __init__(self, parameter: Tensor, silent: bool) -> None:
        super().__init__()
        self.address, self.silent = parameter.untyped_storage().data_ptr(), silent
        self.caught: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in _PRODUCTS:
            return output
        values = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)][:2]
        if len(values) == 2 and values[1].untyped_storage().data_ptr() == self.address:
            self.caught.append(values[0])
            return torch.zeros_like(output) if self.silent else output
        return output


class CalledExperts(Experts):
    """Experts called as ``experts(hidden [N, d], index [N, K], weights [N, K])``, without the protocol's flags.

    What their own forward multiplies with the down-projection is the key. The down-projections are one 3-D parameter,
    or one matrix with the experts below one another (DBRX). Indices behind the last expert stand for experts without
    weights, which hand their input on or return nothing (LongCat).
    """

    def __init__(
        self, module: nn.Module, name: str, down_name: str, layout: ExpertLayout, without_weights: int = 0
    ) -> None:
        self.module, self.name, self._down_name, self.layout = module, name, down_name, layout
        self.without_weights = without_weights

    @property
    def _down(self) -> nn.Parameter:
        return self.module.get_parameter(self._down_name)

    def expert_key(self, x: Tensor, expert: int) -> Tensor:
        """As `Experts.expert_key`; the module is run, and what comes to its down-projection is the key."""
        index = torch.full((len(x), 1), expert, dtype=torch.long, device=x.device)
        if self.without_weights:  # LongCat's forward can't take one slot per token
            index = torch.cat([index, torch.full_like(index, self.layout.num_experts)], dim=1)
        with torch.no_grad(), _MeetsWeight(self._down, silent=False) as seen:
            self.module.forward(x, index, torch.ones(index.shape, dtype=x.dtype, device=x.device))
        keys = [key.reshape(-1, key.shape[-1]) for key in seen.caught]
        if not keys or sum(len(key) for key in keys) != len(x) or keys[0].shape[1] != self.layout.d_hidden:
            raise LayoutError(
                f"{self.name} ({type(self.module).__name__}) multiplies its {self._down_name} with something else than "
                "one key per token, so its keys can't be read. Please report the model's class."
            )
        return keys[0] if len(keys) == 1 else torch.cat(keys)

    def own_sum(self, output: Any, args: tuple, kwargs: dict) -> Tensor:
        """As `Experts.own_sum`: what the output loses without the down-projections."""
        with torch.no_grad(), _MeetsWeight(self._down, silent=True):
            rest = self.sum_of(self.module.forward(*args, **kwargs))
        return self.sum_of(output) - rest

    def expert_bias(self, expert: int) -> Tensor | None:
        """As `Experts.expert_bias`; there are none."""
        return None

    def read(self, expert: int) -> Tensor:
        """As `Experts.read`."""
        return expert_matrix(self._down.data, expert, self.layout)

    def parameters_of(self, expert: int) -> tuple[str, nn.Parameter]:
        """As `Experts.parameters_of`; the same for every expert."""
        return self._down_name, self._down


class SortedInputExperts(CalledExperts):
    """Experts called once with ``[E N, d]``: for each expert all tokens, each times its gate (0 where not routed)."""

    def expert_key(self, x: Tensor, expert: int) -> Tensor:
        """As `Experts.expert_key`; ``x`` holds inputs that the gate has multiplied already."""
        up = self.module.get_parameter("gate_up_proj")[expert]
        hidden = x @ up if self.layout.transposed else nn.functional.linear(x, up)
        gate, linear = hidden.chunk(2, dim=-1)
        return linear * cast(Callable[[Tensor], Tensor], self.module.act_fn)(gate)

    def sum_of(self, output: Any) -> Tensor:
        """As `Experts.sum_of`: the sum over the E copies of each token."""
        return output.reshape(self.layout.num_experts, -1, self.layout.d_model).sum(0)

    def shifted_sum(self, output: Any, rows: Tensor, shift: Tensor) -> Any:
        """As `Experts.shifted_sum`; the first expert's copies are shifted."""
        return output.index_add(0, rows.to(output.device), shift.to(output))


class ParallelExperts(Experts):
    """A block with ``input_linear`` and ``output_linear``, each one matrix per expert, and a ``router``.

    ``module`` is ``output_linear``; the sum over experts is formed in the block.
    """

    sum_in_block = True
    silenced = False
    """Whether the block is being run without its experts; nobody should read its routing then."""

    def __init__(self, block: nn.Module, layout: ExpertLayout) -> None:
        self.block, self.module, self.layout = block, cast(nn.Module, block.output_linear), layout

    def expert_key(self, x: Tensor, expert: int) -> Tensor:
        """As `Experts.expert_key`."""
        weight = cast(nn.Module, self.block.input_linear).get_parameter("weight")[expert]
        gate, linear = nn.functional.linear(x, weight).chunk(2, dim=-1)
        return cast(Callable[[Tensor], Tensor], self.block.activation)(gate) * linear

    def expert_bias(self, expert: int) -> Tensor | None:
        """As `Experts.expert_bias`; the block's one bias is no expert's."""
        return None

    def read(self, expert: int) -> Tensor:
        """As `Experts.read`."""
        return self.module.get_parameter("weight").data[expert]

    def parameters_of(self, expert: int) -> tuple[str, nn.Parameter]:
        """As `Experts.parameters_of`; the same for every expert."""
        return "weight", self.module.get_parameter("weight")

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Inside, the experts answer zero."""
        hook = self.module.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
        self.silenced = True
        try:
            yield
        finally:
            do_all([partial(setattr, self, "silenced", False), hook.remove])


def find_any_experts(
    module: nn.Module, name: str, parent: nn.Module | None, without_weights: bool = False
) -> Experts | None:
    """As `easyedit_moe.moe.experts.find_experts`, and for the experts of this module, too.

    ``parent`` is the module that holds ``module``. Shared experts, which every token visits, are not experts here.
    """
    if "shared" in name.rpartition(".")[2]:
        return None
    found: Experts | None = None
    down: Any = getattr(module, "down_proj", None)
    flagged = all(hasattr(module, flag) for flag in ("is_transposed", "has_bias", "has_gate"))
    if isinstance(down, nn.Parameter) and down.dim() == 3 and not flagged and not is_quantized(down):
        found = unflagged_experts(module, name)
    found = found or stacked_experts(module, name) or parallel_experts(module, parent)
    if found is None:
        return find_experts(module, name, without_weights)
    if not without_weights:
        for _, parameter in found.parameters():
            refuse_offloaded(parameter, name)
    return found


def unflagged_experts(module: nn.Module, name: str) -> Experts | None:
    """Experts with a 3-D ``down_proj`` and ``gate_up_proj`` and without flags; None if they are called otherwise.

    Raises:
        LayoutError: their orientation can't be read off the shapes.
    """
    down, up = getattr(module, "down_proj", None), getattr(module, "gate_up_proj", None)
    if not isinstance(down, nn.Parameter) or not isinstance(up, nn.Parameter) or up.dim() != 3:
        return None
    called = len(inspect.signature(module.forward).parameters)
    if called not in (1, 3):
        return None
    (experts, rows, columns), wide = down.shape, tuple(up.shape[1:])
    straight, turned = wide == (2 * columns, rows), wide == (columns, 2 * rows)
    if not straight and not turned:
        raise LayoutError(
            f"{name} ({type(module).__name__}) has a down_proj {tuple(down.shape)} and a gate_up_proj "
            f"{tuple(up.shape)}, which do not fit each other. Please report the model's class."
        )
    d_model, d_hidden = (columns, rows) if turned else (rows, columns)
    layout = ExpertLayout(experts, d_model, d_hidden, turned, False, True, "packed", down.dtype)
    kind = SortedInputExperts if called == 1 else CalledExperts
    found = kind(module, name, "down_proj", layout, up.shape[0] - experts)
    if hasattr(module, "post_expert_norm"):
        found.nonlinear = NORM_BEHIND.format(f"{name} ({type(module).__name__})")
    return found


def stacked_experts(module: nn.Module, name: str) -> Experts | None:
    """Experts whose matrices lie below one another in ``mlp.w2 [E h, d]`` (DBRX); None for anything else."""
    count, inner = getattr(module, "num_experts", None), getattr(module, "mlp", None)
    weights = [getattr(inner, part, None) for part in ("w1", "v1", "w2")]
    if not isinstance(count, int) or not all(isinstance(w, nn.Parameter) and w.dim() == 2 for w in weights):
        return None
    rows, d_model = cast(nn.Parameter, weights[2]).shape
    if rows % count or len(inspect.signature(module.forward).parameters) != 3:
        return None
    dtype = cast(nn.Parameter, weights[2]).dtype
    return CalledExperts(
        module, name, "mlp.w2", ExpertLayout(count, d_model, rows // count, True, False, True, "packed", dtype)
    )


def parallel_experts(module: nn.Module, parent: nn.Module | None) -> Experts | None:
    """The experts of a block of parallel linears (JetMoE), found at its ``output_linear``; None for anything else.

    Attention whose projections are experts has such linears, too, but no activation between them.
    """
    if parent is None or getattr(parent, "output_linear", None) is not module:
        return None
    first, weight = getattr(parent, "input_linear", None), getattr(module, "weight", None)
    up = getattr(first, "weight", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(up, nn.Parameter) or weight.dim() != 3:
        return None
    experts, d_model, d_hidden = weight.shape
    if not hasattr(parent, "activation") or tuple(up.shape) != (experts, 2 * d_hidden, d_model):
        return None
    return ParallelExperts(parent, ExpertLayout(experts, d_model, d_hidden, False, False, True, "packed", weight.dtype))
