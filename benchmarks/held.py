"""A batch of edits beside earlier ones that are held in place: all columns anew, or the system that editors keep.

"growing columns": earlier edits are columns of the solver's system with zero residual, so that it grows with them.
"as editors hold them": `SolvingEditor.solve_beside`, which keeps a system of the held tokens from batch to batch; the
step that is timed takes in the batch before, of as many tokens, and solves for the new one. That system has as many
numbers as there are pairs of tokens, or of unknowns where these are fewer; BCD keeps its columns until then. Unknowns
are as many as all experts' null spaces have dimensions, so that small ones show the bound.
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import peak_of, timed
from benchmarks.shapes import ModelShape, random_keys, random_residual
from easyedit_moe.algebra.coordinates import ExpertCoordinates
from easyedit_moe.algebra.metric import IdentityMetric, Metric
from easyedit_moe.algebra.nullspace import ExpertProjector, NullSpace
from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.algebra.tucker import TuckerBasis
from easyedit_moe.editors import make_editor
from easyedit_moe.editors.memory import Holding
from easyedit_moe.editors.prepared import PreparedLayer
from easyedit_moe.hparams import load_hyperparams
from easyedit_moe.moe.tails import IdentityTail

GROWING, HELD = "growing columns", "as editors hold them"
SHARE = 16
"""What h is divided by for the dimension of a small null space."""
LONG = 1000
"""Tokens from which on a solve with growing columns is run once only."""


@dataclass(frozen=True)
class Batch:
    """New tokens with their residual, and those before them that are held, by name."""

    keys: RoutedKeys
    residual: Tensor
    held: Mapping[Any, RoutedKeys]

    @classmethod
    def drawn(cls, shape: ModelShape, new: int, made: int, device: str) -> Batch:
        """At random."""
        keys, residual = random_keys(shape, new + made, device), random_residual(shape, new + made, device)
        held = {number: keys.rows(slice(number, number + 1)) for number in range(made)}
        return cls(keys.rows(slice(made, None)), residual[made:], held)

    def everything(self) -> tuple[RoutedKeys, Tensor]:
        """As one system: residuals of held tokens are 0."""
        keys = RoutedKeys.cat([*self.held.values(), self.keys])
        zeros = self.residual.new_zeros(len(self.held), self.residual.shape[1])
        return keys, torch.cat([zeros, self.residual])


def run(
    shape: ModelShape, new: int, made: int, basis: TuckerBasis, lambda_reg: float, repeats: int, device: str
) -> list[dict[str, Any]]:
    """Two rows, one per way, for each solver and metric."""
    batch = Batch.drawn(shape, new, made, device)
    passes = shape.passes
    cases = [
        ("Global", "exact", "identity"), ("MoEEdit-BCD", f"BCD, {passes} passes", "identity"),
        ("MoTE", "MoTE", "identity"), ("Global", "exact", "null space"),
        ("MoEEdit-BCD", f"BCD, {passes} passes", "null space"),
    ]  # fmt: skip
    rows = []
    for method, what, metric in cases:
        layer = PreparedLayer(shape.experts, IdentityTail(), _metric(shape, metric, device), basis)
        step = Step(_editor(method, passes), layer, batch, lambda_reg)
        about = {
            "benchmark": "growth with edits made", "device": device, "E": shape.experts, "d": shape.d_model,
            "h": shape.d_hidden, "T": new + made, "made before": made, "what": what, "metric": metric,
        }  # fmt: skip
        rows += [about | row for row in step.rows(repeats)]
    return rows


@dataclass
class Step:
    """One solve of a method, in both ways."""

    editor: Any
    layer: PreparedLayer
    batch: Batch
    lambda_reg: float

    def growing(self) -> Any:
        """All columns anew."""
        keys, residual = self.batch.everything()
        return self.editor.place(self.editor.solve(keys, residual, self.layer, self.lambda_reg)[0], self.layer)

    def beside(self, known: Holding, held: Mapping[Any, RoutedKeys]) -> Any:
        """As editors do, with what is held from before."""
        self.editor.holding = known
        batch = self.batch
        found = self.editor.solve_beside(0, held, batch.keys, batch.residual, self.layer, self.lambda_reg)[0]
        return self.editor.place(found, self.layer)

    def rows(self, repeats: int) -> list[dict[str, Any]]:
        """Seconds and bytes of both ways, and how far their updates are from each other."""
        batch, before = self.batch, Holding()
        last = min(len(batch.held), batch.keys.num_tokens)
        self.beside(before, dict(list(batch.held.items())[: len(batch.held) - last]))
        gc.collect()
        first, grown, whole = peak_of(self.growing)
        known = self._again(before)
        gc.collect()
        _, peak, update = peak_of(lambda: self.beside(known, batch.held))
        grown_seconds, held_seconds = [first], []
        if batch.keys.num_tokens + len(batch.held) <= LONG:
            grown_seconds = [timed(self.growing)[0] for _ in range(repeats)]
        for _ in range(repeats):
            one = self._again(before)
            held_seconds.append(timed(lambda known=one: self.beside(known, batch.held))[0])
        anew = timed(lambda: self.beside(Holding(), batch.held))[0]
        difference = _difference(whole, update, batch.everything()[0])
        return [
            {
                "way": GROWING, "form": f"{batch.keys.num_tokens + len(batch.held)} columns", **_times(grown_seconds),
                "peak bytes": grown,
            },
            {
                "way": HELD, "form": self.form(), **_times(held_seconds), "peak bytes": peak,
                "seconds where the system is made anew": anew, "difference": difference,
            },
        ]  # fmt: skip

    def form(self) -> str:
        """What is held."""
        count, size = len(self.batch.held), self._unknowns()
        if count > size:
            return f"{size} unknowns"
        # BCD solves for its columns anew until there are more of them than unknowns.
        return GROWING if self.editor.coordinates(self.batch.keys, self.layer) is None else f"{count} held tokens"

    def _unknowns(self) -> int:
        keys = self.batch.keys
        own = self.editor.coordinates(keys, self.layer)
        return (
            own or ExpertCoordinates(self.layer.metric, self.layer.num_experts, keys.d_hidden, keys.key.device)
        ).size

    def _again(self, before: Holding) -> Holding:
        """A copy, as a step changes what is held; it is known by the layer, which stays the same one."""
        return copy.deepcopy(before, {id(self.layer): self.layer})


def _times(seconds: list[float]) -> dict[str, Any]:
    return {"seconds": statistics.median(seconds), "runs": len(seconds)}


def _editor(method: str, passes: int) -> Any:
    more = {"num_passes": passes} if method == "MoEEdit-BCD" else {}
    return make_editor(load_hyperparams(f"{method}/qwen3-30b-a3b", remember_edits=True, **more), progress=False)


def _metric(shape: ModelShape, name: str, device: str) -> Metric:
    if name == "identity":
        return IdentityMetric()
    draw = torch.randn(
        shape.d_hidden, shape.d_hidden // SHARE, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    columns = torch.linalg.qr(draw).Q.to(device)
    return NullSpace(tuple(ExpertProjector(columns, False) for _ in range(shape.experts)))


def _difference(one: Any, other: Any, keys: RoutedKeys) -> float:
    """Of what two updates yield at some keys, relative to the first."""
    first, second = one.apply(keys).double(), other.apply(keys).double()
    return float((first - second).norm() / first.norm())
