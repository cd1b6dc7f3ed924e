"""How a batch of facts is spread over the critical layers: the values of the hyper-parameter ``spread``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import sqrt
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from easyedit_moe.editors.solving import BatchSolve


def spread(batch: BatchSolve) -> None:
    """Solve and write all layers that are edited, by the hparams' ``spread``."""
    published = getattr(batch.hparams, "variant", "paper") == "code"
    (_own_outputs if published else _WAYS[batch.hparams.spread])(batch)


def _layers_left(batch: BatchSolve) -> Iterator[tuple[int, int]]:
    """Each edited layer, and how many are left, itself included."""
    layers = batch.hparams.edited_layers
    return zip(range(len(layers), 0, -1), layers, strict=True)


def _residual(batch: BatchSolve) -> None:
    """Each layer solves with its own keys, collected after the layers before were written, for its part of what is
    left then (MEMIT, MoEEdit). Of one layer: ``last``.
    """
    last, wanted, written = batch.hparams.layers[-1], None, None
    for left, layer in _layers_left(batch):
        with batch.watch.stage("solve"):
            state = batch.capture([layer], [last], written)
            output = state.outputs[last]
            wanted = batch.begun(output) if wanted is None else wanted
            solution = batch.solve(layer, state.keys[layer], (wanted - output) / left)
        batch.write(layer, solution, 1.0)
        written = layer
    batch.measure(start=last)


def _own_outputs(batch: BatchSolve) -> None:
    """As MoEEdit's published code: the last layer's target less each layer's *own* output, over the square root of the
    layers left.
    """
    last, wanted, written = batch.hparams.layers[-1], None, None
    for left, layer in _layers_left(batch):
        with batch.watch.stage("solve"):
            state = batch.capture([layer], [layer, last], written)
            wanted = batch.begun(state.outputs[last]) if wanted is None else wanted
            own = state.outputs[layer].to(wanted.device)
            solution = batch.solve(layer, state.keys[layer], (wanted - own) / sqrt(left))
        batch.write(layer, solution, 1.0)
        written = layer
    batch.measure(start=last)


def _update(batch: BatchSolve) -> None:
    """The last layer is solved for, and its solution divided by the layers left is placed in each (MoTE, eq. 14)."""
    last = batch.hparams.layers[-1]
    with batch.watch.stage("solve"):
        state = batch.capture([last], [last])
        batch.begun(state.outputs[last])
        solution = batch.solve(last, state.keys[last], batch.delta)
    for left, layer in _layers_left(batch):
        batch.write(layer, solution, 1 / left)
    batch.measure(start=batch.hparams.layers[0])


def _once(batch: BatchSolve) -> None:
    """Keys of all layers come from one forward, and each layer solves for its share of the residual; then the same
    again with what is left, as often as ``rounds`` says.
    """
    hp, last = batch.hparams, batch.hparams.layers[-1]
    wanted: Tensor | None = None
    start: int | None = None
    for rounds_left in range(hp.rounds, 0, -1):
        with batch.watch.stage("solve"):
            state = batch.capture(hp.layers, [last], start)
            output = state.outputs[last]
            wanted = batch.begun(output) if wanted is None else wanted
            part = (wanted - output) / rounds_left
            # All are solved before any is written: a solution may depend on the weights that the keys are of.
            solutions: Mapping[int, Any] = {
                layer: batch.solve(layer, state.keys[layer], part * share)
                for layer, share in zip(hp.layers, hp.layer_shares, strict=True)
                if share
            }
        for layer, solution in solutions.items():
            batch.write(layer, solution, 1.0)
        start = hp.layers[0]
    batch.measure(start=hp.layers[0])


_WAYS: Mapping[str, Callable[[BatchSolve], None]] = {
    "residual": _residual,
    "update": _update,
    "once": _once,
    "last": _residual,
}
