"""From a change that is wanted at a layer's output to the change of the experts' sum that brings it about.

What lies between the two is the layer's tail. A plain residual sum hands a change on as it is, a residual multiplier
scales it. A norm behind the block, a projection out of a latent space or hyper-connections do neither: there the tail
is run alone, at each fact token, and its local Jacobian J is inverted in the least-squares sense by conjugate
gradients on ``J^T J + eps``; every step is checked by running the tail, so that a curved tail gets Newton steps. What
no change of the experts can bring about (the direction that a norm removes, a stream that the layer does not write) is
left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from easyedit_moe.facts.tokens import collate
from easyedit_moe.moe.capture import frozen_parameters, hooks, inference_mode_of, replaced_methods, run, stop_after
from easyedit_moe.moe.layer_outputs import layer_output
from easyedit_moe.moe.layers import MoELayer, MoELayerView

_NEWTON_STEPS = 6
_HALVINGS = 3
_GRADIENT_STEPS = 48
_CLOSE = 1e-4
_RIDGE = 1e-4


@dataclass(frozen=True)
class FactPlaces:
    """Where T facts stand: token sequences, the position of each fact token, and how they are run.

    Attributes:
        view: of the model, at its present weights.
        sequences: token ids, without padding.
        positions: per sequence, the index of its fact token.
        pad: token id to pad with.
        batch_size: sequences in one forward.
    """

    view: MoELayerView
    sequences: Sequence[Sequence[int]]
    positions: Sequence[int]
    pad: int
    batch_size: int = 64


class Tail(ABC):
    """What lies between the experts' sum and the layer's output."""

    kind: ClassVar[str]
    reach: int = 0

    @abstractmethod
    def pull_back(self, layer: int, wanted: Tensor, weight: float, places: FactPlaces) -> Tensor:
        """``weight`` times the change ``[T, d]`` of the experts' sum that moves the layer's output by ``wanted``.

        Args:
            layer: index of the layer.
            wanted: ``[T, D]`` float32, changes of the layer's output at the fact tokens.
            weight: a factor on the result.
            places: of the facts; only a local tail looks at them.
        """


@dataclass(frozen=True)
class IdentityTail(Tail):
    """A plain residual sum."""

    kind: ClassVar[str] = "identity"
    gain: ClassVar[float] = 1.0

    def pull_back(self, layer: int, wanted: Tensor, weight: float, places: FactPlaces) -> Tensor:
        """As `Tail.pull_back`."""
        return wanted * weight


@dataclass(frozen=True)
class ScaleTail(Tail):
    """The experts' sum is multiplied by ``gain``, which is not 0."""

    gain: float
    kind: ClassVar[str] = "scale"

    def pull_back(self, layer: int, wanted: Tensor, weight: float, places: FactPlaces) -> Tensor:
        """As `Tail.pull_back`."""
        return wanted * (weight / self.gain)


@dataclass(frozen=True)
class LocalTail(Tail):
    """A tail that is known by running it: its Jacobian at each fact token.

    Attributes:
        reach: how many tokens before its own each output depends on, as behind a short convolution. What the experts
            return for these must stay as it is for the Jacobian to hold.
    """

    reach: int = 0
    kind: ClassVar[str] = "local Jacobian"

    def pull_back(self, layer: int, wanted: Tensor, weight: float, places: FactPlaces) -> Tensor:
        """As `Tail.pull_back`."""
        return pulled_back(layer, wanted, places).shift.to(wanted.device) * weight


@dataclass(frozen=True)
class PulledBack:
    """Changes of the experts' sum ``shift [T, d]``, and of the layer's output that they bring about: ``[T, D]``."""

    shift: Tensor
    reached: Tensor


def pulled_back(layer: int, wanted: Tensor, places: FactPlaces) -> PulledBack:
    """The change of the experts' sum at each fact token that comes closest to ``wanted [T, D]`` at the layer's output.

    Both results are float32. The weights are as they are now, and stay.
    """
    view = places.view
    moe = view.layers[layer]
    order = sorted(range(len(places.sequences)), key=lambda i: len(places.sequences[i]))
    shift = wanted.new_zeros(len(wanted), moe.experts.layout.d_model)
    reached = torch.zeros_like(wanted)
    for start in range(0, len(order), places.batch_size):
        chosen = order[start : start + places.batch_size]
        with recorded_tail(view, layer, places, chosen) as tail:
            found = _solve(tail, wanted[chosen].float().to(tail.device))
        shift[chosen], reached[chosen] = found.shift.to(shift), found.reached.to(reached)
    return PulledBack(shift, reached)


class RecordedTail:
    """The tail of one layer for one batch of B sequences, as a function of a shift of the experts' sum.

    Attributes:
        width: of the experts' sum.
        device: where the layer's output lies.
    """

    def __init__(self, moe: MoELayer, positions: Sequence[int]) -> None:
        self.moe, self.positions = moe, list(positions)
        self.width = moe.experts.layout.d_model
        self._before: list[tuple[nn.Module, Any]] = []
        self._reached = False

    def record(self, handles: list[Any]) -> None:
        """Register hooks that keep the layer's input, and what it computes up to its experts."""
        site = self.moe.sum_site

        def keep_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._args, self._kwargs = args, kwargs

        def keep_site(module: nn.Module, args: tuple, output: Any) -> None:
            self._site, self._reached = output, True

        def keep_child(module: nn.Module, args: tuple, output: Any) -> None:
            if not self._reached:
                self._before.append((module, output))

        def keep_output(module: nn.Module, args: tuple, output: Any) -> None:
            hidden = layer_output(output)
            self.device, self.tokens = hidden.device, hidden.shape[1]

        handles.append(self.moe.layer.register_forward_pre_hook(keep_input, with_kwargs=True))
        inside = {id(module) for module in site.modules()}
        handles += [m.register_forward_hook(keep_child) for m in _parts(self.moe.layer) if id(m) not in inside]
        handles.append(site.register_forward_hook(keep_site))
        handles.append(self.moe.layer.register_forward_hook(keep_output))

    @property
    def recorded_sum(self) -> Any:
        """What the module returned in whose output the experts' sum appears."""
        return self._site

    def outputs(self, shift: Tensor) -> Tensor:
        """The layer's output ``[B, S, D]`` float32 with the experts' sum shifted by ``[B, d]`` at the fact tokens."""
        rows = torch.arange(len(self.positions)) * self.tokens + torch.tensor(self.positions)

        def moved(*args: Any, **kwargs: Any) -> Any:
            return self.moe.experts.shifted_sum(self._site, rows, shift)

        counts: dict[int, int] = {}
        for module, _ in self._before:
            counts[id(module)] = counts.get(id(module), 0) + 1
        known = {module: _copies(output) for module, output in self._before if counts[id(module)] == 1}
        with replaced_methods({**known, self.moe.sum_site: moved}):
            return layer_output(self.moe.layer.forward(*self._args, **self._kwargs)).float()

    def __call__(self, shift: Tensor) -> Tensor:
        """The layer's output ``[B, D]`` float32 at the fact tokens."""
        return self.outputs(shift)[torch.arange(len(self.positions)), self.positions]


def _parts(layer: nn.Module) -> list[nn.Module]:
    """The modules that a layer calls itself."""
    found: list[nn.Module] = []
    for child in layer.children():
        found += list(child.children()) if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child]
    return found


def _copies(output: Any) -> Callable[..., Any]:
    """A forward that answers a copy of ``output``: the layer may add to it in place."""

    def answer(*args: Any, **kwargs: Any) -> Any:
        return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, output)

    return answer


@contextmanager
def recorded_tail(
    view: MoELayerView, layer: int, places: FactPlaces, chosen: Sequence[int] | None = None
) -> Iterator[RecordedTail]:
    """The tail of a layer for some of the facts; run it only inside."""
    chosen = range(len(places.sequences)) if chosen is None else chosen
    moe = view.layers[layer]
    tail = RecordedTail(moe, [places.positions[i] for i in chosen])
    with inference_mode_of(view.model), frozen_parameters(view.model):
        with hooks() as handles:
            tail.record(handles)
            handles.append(stop_after(moe.layer))
            run(view.model, collate([places.sequences[i] for i in chosen], places.pad))
        yield tail


def within_reach(tail: RecordedTail, wanted: Tensor) -> Tensor:
    """The part ``[B, D]`` of changes of the layer's output that experts can bring about; use where ``tail`` may run."""
    return _solve(tail, wanted).reached


def _solve(tail: RecordedTail, wanted: Tensor) -> PulledBack:
    """Damped Newton steps, each row on its own: a row keeps a step that brings it closer, else its ridge grows."""
    shift = torch.zeros(len(wanted), tail.width, device=wanted.device)
    plain = tail(shift)
    size = wanted.norm(dim=1)
    reached = torch.zeros_like(wanted)
    ridge, stalls = torch.full_like(size, _RIDGE), 0
    for _ in range(_NEWTON_STEPS):
        left = wanted - reached
        error = left.norm(dim=1)
        if bool((error <= _CLOSE * size).all()):
            break
        step = _gauss_newton(tail, shift, left, ridge)
        better = torch.zeros(len(wanted), dtype=torch.bool, device=wanted.device)
        for halving in range(_HALVINGS):
            trial = shift + step * 0.5**halving
            moved = tail(trial) - plain
            closer = ~better & ((wanted - moved).norm(dim=1) < error * (1 - _CLOSE))
            shift, reached = torch.where(closer[:, None], trial, shift), torch.where(closer[:, None], moved, reached)
            better |= closer
            if bool((better | (error <= _CLOSE * size)).all()):
                break
        ridge = torch.where(better, ridge, 100 * ridge)
        stalls = 0 if bool(better.any()) else stalls + 1
        if stalls > 1:  # what is left is out of reach
            break
    return PulledBack(shift, reached)


def _gauss_newton(tail: RecordedTail, shift: Tensor, left: Tensor, ridge: Tensor) -> Tensor:
    """``(J^T J + eps)^{-1} J^T left`` per row, by conjugate gradients; J is that of the tail at ``shift``.

    ``ridge [T]`` is eps in units of J's own squared gain along ``left``.
    """
    with torch.enable_grad():
        at = shift.detach().requires_grad_(True)
        output = tail(at)
        cotangent = torch.zeros_like(output, requires_grad=True)
        (pulled,) = torch.autograd.grad(output, at, cotangent, create_graph=True)

        def transposed(value: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(output, at, value, retain_graph=True)
            return found

        def forward(value: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(pulled, cotangent, value, retain_graph=True)
            return found

        right = transposed(left)
        damping = ridge * (right.square().sum(1) / left.square().sum(1).clamp_min(1e-30))
        return _conjugate_gradients(lambda v: transposed(forward(v)) + damping[:, None] * v, right)


def _conjugate_gradients(times: Callable[[Tensor], Tensor], right: Tensor) -> Tensor:
    """Solve ``A x = right`` for every row at once; A is symmetric, positive and acts on each row alone."""
    found, rest = torch.zeros_like(right), right.clone()
    direction, squared = rest.clone(), rest.square().sum(1)
    start = squared.clone()
    for _ in range(min(_GRADIENT_STEPS, 2 * right.shape[1])):
        going = squared > 1e-10 * start
        if not bool(going.any()):
            break
        image = times(direction)
        curve = (direction * image).sum(1)
        length = torch.where(going & (curve > 0), squared / curve.clamp_min(1e-38), torch.zeros_like(curve))
        found, rest = found + length[:, None] * direction, rest - length[:, None] * image
        new = rest.square().sum(1)
        direction = rest + (new / squared.clamp_min(1e-38))[:, None] * direction
        squared = new
    return found
