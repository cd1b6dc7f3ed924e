"""What ``remember_edits`` knows of earlier edits, and the systems that hold them in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from easyedit_moe.algebra.coordinates import Coordinates
from easyedit_moe.algebra.held import Held, HeldMoment, HeldSystem
from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.editors.lasting import Carried
from easyedit_moe.editors.prepared import PreparedLayer
from easyedit_moe.targets.joining import Place

Name = str | Place
"""What a later fact has in common with the one that it supersedes."""

COMPACT = 16
"""Solves after which a memory lets go of keys of superseded facts, and again after as many."""


@dataclass(frozen=True, eq=False)
class Remembered:
    """The facts of one solve.

    Attributes:
        prompts: of the facts.
        keys: layer that was solved for -> their keys, the contexts of each fact side by side.
        places: where the facts lie, for ``join_facts``; then a later fact at the same place supersedes one, too.
        wanted: layer -> ``[T, d]``, what all edits together should change at these keys, for ``cumulative_ridge``.
    """

    prompts: tuple[str, ...]
    keys: Mapping[int, RoutedKeys]
    places: tuple[Place, ...] = ()
    wanted: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> tuple[Name, ...]:
        """By what a later fact supersedes each: its place, or its prompt."""
        return self.places or self.prompts

    def of(self, layer: int, fact: int) -> RoutedKeys:
        """Keys of one fact."""
        keys = self.keys[layer]
        return keys if len(self.prompts) == 1 else keys.rows(self._rows(keys.num_tokens, fact))

    def wanted_of(self, layer: int, fact: int) -> Tensor:
        """What is wanted of one fact."""
        wanted = self.wanted[layer]
        return wanted[self._rows(len(wanted), fact)]

    def _rows(self, count: int, fact: int) -> slice:
        size = count // len(self.prompts)
        return slice(fact * size, (fact + 1) * size)

    def only(self, facts: Sequence[int]) -> Remembered:
        """Some of the facts, with keys of their own."""
        keys = {layer: RoutedKeys.cat([self.of(layer, fact) for fact in facts]) for layer in self.keys}
        places = tuple(self.places[fact] for fact in facts) if self.places else ()
        wanted = {layer: torch.cat([self.wanted_of(layer, fact) for fact in facts]) for layer in self.wanted}
        return Remembered(tuple(self.prompts[fact] for fact in facts), keys, places, wanted)


_H = TypeVar("_H", bound=Held)

Row = tuple[Remembered, int]
"""One remembered fact: the solve that it was part of, and its place there."""


class Rows(Mapping[Row, RoutedKeys]):
    """Keys of remembered facts at a layer, taken out when they are asked for: of most only their names are."""

    def __init__(self, layer: int, names: dict[Row, None]) -> None:
        self._layer, self._names = layer, names

    def __getitem__(self, row: Row) -> RoutedKeys:
        if row not in self._names:
            raise KeyError(row)
        solve, fact = row
        return solve.of(self._layer, fact)

    def __contains__(self, row: object) -> bool:
        return row in self._names

    def __iter__(self) -> Iterator[Row]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def num_tokens(self) -> int:
        """Rows of all facts together, which are their contexts."""
        return sum(solve.keys[self._layer].num_tokens // len(solve.prompts) for solve, _ in self._names)


def tokens_of(held: Mapping[Row, RoutedKeys]) -> int:
    """Rows of all held facts together; keys are not taken out for it where they are a memory's."""
    return held.num_tokens if isinstance(held, Rows) else sum(keys.num_tokens for keys in held.values())


class EditMemory:
    """What a batch knows of earlier ones; a value: passed in, and returned extended.

    It holds keys, for ``remember_edits``; a fact that was edited again, by its prompt, counts as it was edited last.

    Attributes:
        edits: how many edits the earlier batches made.
        carried: what options for long runs carry on.
    """

    def __init__(
        self,
        log: list[Remembered] | None = None,
        edits: int = 0,
        length: int | None = None,
        carried: Carried | None = None,
    ) -> None:
        # Values that extend each other share one list, of which each knows how much is its own: to keep the memory of
        # every batch of a long run then takes no more than to keep the last.
        self._log = [] if log is None else log
        self._length = len(self._log) if length is None else length
        self.edits = edits
        self.carried = carried or Carried()

    def extended(self, solves: Sequence[Remembered], edits: int, carried: Carried | None = None) -> EditMemory:
        """A memory that also holds what these solves wrote, of ``edits`` more edits; ``carried`` where it changed."""
        carried = carried or self.carried
        if not solves:
            return EditMemory(self._log, self.edits + edits, self._length, carried)
        log = self._log if len(self._log) == self._length else self._log[: self._length]
        log.extend(solves)
        grown = EditMemory(log, self.edits + edits, carried=carried)
        return grown._compact() if len(log) >= COMPACT and len(log) % COMPACT == 0 else grown

    def _compact(self) -> EditMemory:
        """The same facts without those that were superseded, whose keys would take memory on."""
        kept: dict[Remembered, list[int]] = {}
        for solve, fact in reversed(list(self._current())):
            kept.setdefault(solve, []).append(fact)
        log = [solve if len(facts) == len(solve.prompts) else solve.only(facts) for solve, facts in kept.items()]
        return EditMemory(log, self.edits, carried=self.carried)

    def rows(self, layer: int, superseded: Sequence[Name] = ()) -> Rows:
        """Keys of each fact that was solved for at a layer, without facts of these names; oldest first."""
        found = [row for row in self._current(superseded) if layer in row[0].keys]
        return Rows(layer, dict.fromkeys(reversed(found)))

    @property
    def keys(self) -> dict[int, list[RoutedKeys]]:
        """Layer -> keys per solve, facts that were edited again left out."""
        found: dict[int, dict[Remembered, list[RoutedKeys]]] = {}
        for solve, fact in reversed(list(self._current())):
            for layer in solve.keys:
                found.setdefault(layer, {}).setdefault(solve, []).append(solve.of(layer, fact))
        return {
            layer: [s.keys[layer] if len(k) == len(s.prompts) else RoutedKeys.cat(k) for s, k in solves.items()]
            for layer, solves in found.items()
        }

    def _current(self, superseded: Sequence[Name] = ()) -> Iterator[Row]:
        """The newest edit of each prompt or place, newest first."""
        seen = set(superseded)
        for number in range(self._length - 1, -1, -1):
            solve = self._log[number]
            for fact in range(len(solve.prompts) - 1, -1, -1):
                if solve.names[fact] not in seen:
                    seen.add(solve.names[fact])
                    yield solve, fact


class Holding:
    """Systems of held rows by layer, kept from batch to batch; an editor has one.

    They say nothing that the memory does not: where it went back, or is another, they are made anew.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[PreparedLayer, Held]] = {}

    def system(
        self,
        layer: int,
        prepared: PreparedLayer,
        rows: Mapping[Row, RoutedKeys],
        coordinates: Coordinates,
        lambda_reg: float,
    ) -> HeldSystem:
        """The layer's system with exactly these rows."""
        held = self._taken(layer, prepared)
        if not isinstance(held, HeldSystem) or held.lambda_reg != lambda_reg:
            held = HeldSystem(coordinates, lambda_reg)
        return self._holding(layer, prepared, held, rows)

    def moment(
        self, layer: int, prepared: PreparedLayer, rows: Mapping[Row, RoutedKeys], coordinates: Coordinates
    ) -> HeldMoment:
        """The layer's second moment of exactly these rows."""
        held = self._taken(layer, prepared)
        if not isinstance(held, HeldMoment):
            held = HeldMoment(coordinates)
        return self._holding(layer, prepared, held, rows)

    def _taken(self, layer: int, prepared: PreparedLayer) -> Held | None:
        """What is kept of a layer as it is prepared; taken out, so that it is not kept where a step fails half-way."""
        known, held = self._held.pop(layer, (None, None))
        return held if known is prepared else None

    def _holding(self, layer: int, prepared: PreparedLayer, held: _H, rows: Mapping[Row, RoutedKeys]) -> _H:
        """Kept again, with exactly these rows."""
        held.hold(rows)
        self._held[layer] = (prepared, held)
        return held
