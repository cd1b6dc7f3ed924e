"""The experts of one MoE layer behind one interface, whatever their storage.

``PackedExperts`` covers every module that follows transformers' experts protocol (one 3-D parameter for all experts);
``ModuleListExperts`` the older one module per expert. The layout is read from the module's own flags and classes; what
is not recognised is refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from easyedit_moe.errors import LayoutError, QuantizedExpertsError, offloaded
from easyedit_moe.moe.layer_outputs import layer_output, replace_layer_output

_QUANTIZED_MARKS = ("down_proj_blocks", "down_proj_scales", "down_proj_scale_inv", "down_proj_qweight")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_QUANTIZED_ADVICE = (
    "Editing needs float weights: load the model dequantised (for MXFP4 pass "
    "quantization_config=Mxfp4Config(dequantize=True), which easyedit_moe.moe.loading does by itself) or in bf16."
)


NORM_BEHIND = (
    "{} normalises after each down-projection, so its output is not linear in the down-projections and no solver can "
    "edit it. MoE-FT, MoE-LoRA and MEMoE, which train, need no such thing."
)


@dataclass(frozen=True)
class ExpertLayout:
    """How a layer stores its down-projections.

    Attributes:
        num_experts: E.
        d_model: d.
        d_hidden: h.
        transposed: stored as ``[E, h, d]`` rather than the canonical ``[E, d, h]``.
        biased: the down-projections have biases.
        gated: gate and up projections (rather than up alone).
        storage: "packed" or "modulelist".
        dtype: of the parameters.
    """

    num_experts: int
    d_model: int
    d_hidden: int
    transposed: bool
    biased: bool
    gated: bool
    storage: str
    dtype: torch.dtype


def expert_matrix(parameter: Tensor, expert: int, layout: ExpertLayout) -> Tensor:
    """``W_j [d, h]``, a view on the parameter that holds it: all experts' or, in a ModuleList, this one's."""
    weight = parameter
    if layout.storage == "packed":
        # All experts below one another are one matrix.
        weight = (parameter if parameter.dim() == 3 else parameter.unflatten(0, (layout.num_experts, -1)))[expert]
    return weight.mT if layout.transposed else weight


class Experts(ABC):
    """Common interface; ``module`` is the packed module or the ModuleList."""

    module: nn.Module
    layout: ExpertLayout
    sum_in_block: bool = False
    """No module returns the gated sum over experts alone; it is part of the block's output."""
    without_weights: int = 0
    """Further experts that a router may pick, behind the last one, which have no weights."""

    nonlinear: str = ""
    """Why no edit of the down-projections can be solved for, though they can be trained; empty where it can."""

    def sum_of(self, output: Any) -> Tensor:
        """The gated sums ``[N, d]`` in what the module returned, or, if ``sum_in_block``, what the block returned."""
        return layer_output(output).reshape(-1, self.layout.d_model)

    def own_sum(self, output: Any, args: tuple, kwargs: dict) -> Tensor:
        """The gated sums ``[N, d]`` of the experts that have weights, as the module itself computed them.

        For modules that return it; ``args`` and ``kwargs`` are what it was called with.
        """
        return self.sum_of(output)

    def shifted_sum(self, output: Any, rows: Tensor, shift: Tensor) -> Any:
        """That output with the sums of the tokens ``rows [n]`` shifted by ``[n, d]``; a new one."""
        hidden = layer_output(output)
        flat = hidden.reshape(-1, self.layout.d_model)
        moved = flat.index_add(0, rows.to(flat.device), shift.to(flat))
        return replace_layer_output(output, moved.reshape(hidden.shape))

    @abstractmethod
    def expert_key(self, x: Tensor, expert: int) -> Tensor:
        """Keys ``[n, h]`` of hidden states ``x [n, d]`` at one expert, in the model's dtype."""

    @abstractmethod
    def expert_bias(self, expert: int) -> Tensor | None:
        """``b_j [d]`` of the down-projection, or None."""

    @abstractmethod
    def read(self, expert: int) -> Tensor:
        """``W_j [d, h]``: a view on the parameter in canonical orientation."""

    @abstractmethod
    def parameters_of(self, expert: int) -> tuple[str, nn.Parameter]:
        """Name within ``module`` and parameter that holds ``W_j`` (shared by all experts if packed)."""

    def matrices(self) -> list[Tensor]:
        """All ``W_j [d, h]``, as views on the parameters."""
        return [self.read(j) for j in range(self.layout.num_experts)]

    def stacked(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``W [E, d, h]`` as a new tensor."""
        return torch.stack([self.read(j).to(dtype) for j in range(self.layout.num_experts)])

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each parameter that holds down-projections, once, with its name within ``module``."""
        seen: set[int] = set()
        for expert in range(self.layout.num_experts):
            name, parameter = self.parameters_of(expert)
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def keys(self, x: Tensor, expert: Tensor) -> Tensor:
        """The one key function: ``[S, h]`` for rows ``x [S, d]``, each at its own expert ``[S]``."""
        order = torch.argsort(expert, stable=True)
        hit, counts = torch.unique_consecutive(expert[order], return_counts=True)
        out = x.new_empty(len(expert), self.layout.d_hidden)
        start = 0
        for j, count in zip(hit.tolist(), counts.tolist(), strict=True):
            rows = order[start : start + count]
            out[rows] = self.expert_key(x[rows], j).to(out.dtype)
            start += count
        return out


class PackedModule(Protocol):
    """What transformers' experts protocol promises of a packed module.

    Attributes:
        down_proj: ``[E, d, h]``, or ``[E, h, d]`` if ``is_transposed``.
        down_proj_bias: ``[E, d]``; only if ``has_bias``.
        act_fn: the activation.
        is_transposed: orientation of all projections.
        has_bias: whether all projections have biases.
        has_gate: whether the projection up is ``gate_up_proj``, whose output ``_apply_gate`` turns into the key.
    """

    down_proj: nn.Parameter
    down_proj_bias: nn.Parameter
    act_fn: Callable[[Tensor], Tensor]
    is_transposed: bool
    has_bias: bool
    has_gate: bool
    _apply_gate: Callable[[Tensor], Tensor]


class PackedExperts(Experts):
    """Experts as 3-D parameters under transformers' protocol (``is_transposed``, ``has_bias``, ``has_gate``)."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        packed = self.packed
        down = packed.down_proj
        if getattr(module, "has_post_expert_norm", False):
            self.nonlinear = NORM_BEHIND.format(f"{name} ({type(module).__name__})")
        self._up_name = "gate_up_proj" if packed.has_gate else "up_proj"
        up = getattr(module, self._up_name, None)
        if not isinstance(up, nn.Parameter) or up.dim() != 3:
            raise LayoutError(
                f"{name} ({type(module).__name__}) has a packed down_proj but no 3-D {self._up_name}; this layout is "
                "unknown. Please report the model's class."
            )
        transposed = bool(packed.is_transposed)
        experts, rows, columns = down.shape
        d_model, d_hidden = (columns, rows) if transposed else (rows, columns)
        width = up.shape[2] if transposed else up.shape[1]
        d_in = up.shape[1] if transposed else up.shape[2]
        if width != d_hidden * (2 if packed.has_gate else 1) or d_in != d_model:
            raise LayoutError(
                f"{name}: down_proj {tuple(down.shape)} and {self._up_name} {tuple(up.shape)} do not fit each other "
                f"under is_transposed={transposed}, has_gate={packed.has_gate}; this layout is unknown."
            )
        self.layout = ExpertLayout(
            experts, d_model, d_hidden, transposed, bool(packed.has_bias), bool(packed.has_gate), "packed", down.dtype
        )

    @property
    def packed(self) -> PackedModule:
        """``module``, as what transformers' protocol says it is."""
        return cast(PackedModule, self.module)

    def expert_key(self, x: Tensor, expert: int) -> Tensor:
        """As `Experts.expert_key`, by the module's own activation and gating function."""
        packed, up = self.packed, getattr(self.module, self._up_name)[expert]
        hidden = x @ up if self.layout.transposed else nn.functional.linear(x, up)
        if self.layout.biased:
            hidden = hidden + getattr(self.module, f"{self._up_name}_bias")[expert]
        return packed._apply_gate(hidden) if self.layout.gated else packed.act_fn(hidden)

    def expert_bias(self, expert: int) -> Tensor | None:
        """As `Experts.expert_bias`."""
        return self.packed.down_proj_bias[expert] if self.layout.biased else None

    def read(self, expert: int) -> Tensor:
        """As `Experts.read`; transposed where the parameter is."""
        return expert_matrix(self.packed.down_proj.data, expert, self.layout)

    def parameters_of(self, expert: int) -> tuple[str, nn.Parameter]:
        """As `Experts.parameters_of`; the same for every expert."""
        return "down_proj", self.packed.down_proj


_DOWN_NAMES = ("down_proj", "w2")


class ModuleListExperts(Experts):
    """One module per expert with its own down-projection ``nn.Linear`` (``down_proj``, or Mixtral's ``w2``)."""

    module: nn.ModuleList
    sum_in_block = True

    def __init__(self, module: nn.ModuleList, name: str) -> None:
        self.module = module
        self._down_name = next(n for n in _DOWN_NAMES if hasattr(module[0], n))
        first = self._down(0)
        for j in range(len(module)):
            if type(module[j]) is not type(module[0]) or self._down(j).weight.shape != first.weight.shape:
                raise LayoutError(f"{name}: expert {j} differs in class or shape from expert 0; layout unknown.")
        gated = any(hasattr(module[0], n) for n in ("gate_proj", "w1"))
        d_model, d_hidden = first.weight.shape
        biased = first.bias is not None
        self.layout = ExpertLayout(
            len(module), d_model, d_hidden, False, biased, gated, "modulelist", first.weight.dtype
        )

    def _down(self, expert: int) -> nn.Linear:
        return getattr(self.module[expert], self._down_name)

    def expert_key(self, x: Tensor, expert: int) -> Tensor:
        """As `Experts.expert_key`; the expert is run, and what comes to its down-projection is the key."""
        caught: list[Tensor] = []
        hook = self._down(expert).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        try:
            self.module[expert](x)
        finally:
            hook.remove()
        return caught[0].reshape(len(x), -1)

    def expert_bias(self, expert: int) -> Tensor | None:
        """As `Experts.expert_bias`."""
        return self._down(expert).bias

    def read(self, expert: int) -> Tensor:
        """As `Experts.read`."""
        return self._down(expert).weight.data

    def parameters_of(self, expert: int) -> tuple[str, nn.Parameter]:
        """As `Experts.parameters_of`; one parameter per expert."""
        weight = cast(nn.Parameter, self._down(expert).weight)  # PyTorch declares it as a Tensor only
        return f"{expert}.{self._down_name}.weight", weight


def find_experts(module: nn.Module, name: str, without_weights: bool = False) -> Experts | None:
    """Wrap ``module`` if it is a collection of experts; None if it plainly is not.

    ``without_weights`` accepts experts on the meta device, of which only the layout is then known.

    Raises:
        QuantizedExpertsError: experts in MXFP4, FP8, bitsandbytes or another quantised format.
        LayoutError: a collection whose layout is not known, or whose weights are offloaded.
    """
    if isinstance(module, nn.ModuleList):
        return _find_modulelist(module, name, without_weights)
    marks = [mark for mark in _QUANTIZED_MARKS if hasattr(module, mark)]
    down: Any = getattr(module, "down_proj", None)
    packed = isinstance(down, nn.Parameter) and down.dim() == 3
    if marks or (packed and is_quantized(down)):
        found = ", ".join(marks) if marks else f"down_proj is a {type(down.data).__name__} of {down.dtype}"
        raise QuantizedExpertsError(f"{name} ({type(module).__name__}) is quantised: {found}. {_QUANTIZED_ADVICE}")
    if not packed:
        if isinstance(down, nn.Parameter) and is_quantized(down) and hasattr(module, "num_experts"):
            raise QuantizedExpertsError(
                f"{name} ({type(module).__name__}) is quantised: down_proj is a {type(down).__name__} of {down.dtype}. "
                f"{_QUANTIZED_ADVICE}"
            )
        return None
    missing = [flag for flag in ("is_transposed", "has_bias", "has_gate") if not hasattr(module, flag)]
    if missing:
        raise LayoutError(
            f"{name} ({type(module).__name__}) holds a 3-D down_proj {tuple(down.shape)} but lacks "
            f"{', '.join(missing)}, the flags of transformers' experts protocol, so its orientation can't be known. "
            "It is refused rather than guessed; please report the model's class."
        )
    if not without_weights:
        refuse_offloaded(down, name)
    return PackedExperts(module, name)


def is_quantized(parameter: Tensor) -> bool:
    """Whether a parameter's storage is not the float matrix that it stands for."""
    # A tensor subclass (torchao, DTensor) reports a float dtype, but its storage is not the matrix.
    return (
        parameter.dtype not in _FLOATS or hasattr(parameter, "quant_state") or type(parameter.data) is not torch.Tensor
    )


def _find_modulelist(module: nn.ModuleList, name: str, without_weights: bool) -> Experts | None:
    if len(module) < 2 or not name.split(".")[-1].endswith("experts"):
        return None
    down = next((getattr(module[0], n) for n in _DOWN_NAMES if hasattr(module[0], n)), None)
    if not isinstance(down, nn.Module):
        raise LayoutError(
            f"{name}: experts of class {type(module[0]).__name__} have no down-projection named "
            f"{' or '.join(_DOWN_NAMES)}; this layout is unknown. Please report the model's class."
        )
    down = float_linear(down, f"{name}: the down-projections")
    if not without_weights:
        refuse_offloaded(down.weight, name)
    return ModuleListExperts(module, name)


def float_linear(down: nn.Module, called: str) -> nn.Linear:
    """A module that is a plain linear layer with float weights; ``called`` names it at the start of a message.

    Raises:
        LayoutError: it carries an adapter. QuantizedExpertsError: it is of another class, or quantised.
    """
    if hasattr(down, "base_layer"):
        raise LayoutError(
            f"{called} carry an adapter ({type(down).__name__}). Take it off (unload() in PEFT) or merge it "
            "(merge_and_unload()) first."
        )
    if not isinstance(down, nn.Linear) or is_quantized(down.weight):
        dtype = getattr(getattr(down, "weight", None), "dtype", "unknown")
        raise QuantizedExpertsError(
            f"{called} are no float nn.Linear but of class {type(down).__name__}, dtype {dtype}. {_QUANTIZED_ADVICE}"
        )
    return down


def refuse_offloaded(parameter: Tensor, name: str) -> None:
    """LayoutError if the parameter of this name has no storage here."""
    if parameter.device.type == "meta":
        raise offloaded(name)
