"""Routed keys: the sparse form in which every solver sees a batch of facts (pure, torch only)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutedKeys:
    """Experts, gates and keys of T fact tokens at one layer.

    Together they are the design vectors ``psi[t] = concat_j g[t,j] k[t,j]`` without their zero blocks.

    Attributes:
        expert: ``[T, K]`` int64, the experts that the router picked.
        gate: ``[T, K]`` float, the weights with which it mixes them; slots whose gate is 0 are padding.
        key: ``[T, K, h]`` float, the input of each picked expert's down-projection.
    """

    expert: Tensor
    gate: Tensor
    key: Tensor

    @property
    def num_tokens(self) -> int:
        """Number T of tokens."""
        return self.expert.shape[0]

    @property
    def d_hidden(self) -> int:
        """Width h of a key."""
        return self.key.shape[-1]

    def design(self, dtype: torch.dtype = torch.float64) -> list[ExpertDesign]:
        """One `ExpertDesign` per expert that is hit, in increasing order of experts.

        Slots with a zero gate are left out: a padded slot names an expert that its token may also really use.
        """
        order, counts = self._sorted()
        width = self.expert.shape[1]
        # Sorted first and scaled in place: the blocks are views, and only one copy in ``dtype`` exists.
        scaled = self.key.reshape(-1, self.d_hidden)[order].to(dtype)
        scaled *= self.gate.reshape(-1)[order].to(dtype).unsqueeze(-1)
        blocks, start = [], 0
        for expert, count in counts.items():
            chosen = slice(start, start + count)
            blocks.append(ExpertDesign(expert, order[chosen] // width, scaled[chosen].T, order[chosen]))
            start += count
        return blocks

    def slots(self) -> dict[int, Tensor]:
        """Per expert that is hit, in increasing order, its slots ``[T_j]`` int64 of the T * K, padded ones left out."""
        order, counts = self._sorted()
        return dict(zip(counts, order.split(list(counts.values())), strict=True))

    def _sorted(self) -> tuple[Tensor, dict[int, int]]:
        """Places of all slots but padded ones, by expert and then as they are, and how many each expert has.

        The device is read once: neither masks nor unique values, each of which it would be read for.
        """
        padded = torch.iinfo(torch.int64).max
        marked = torch.where(self.gate != 0, self.expert, padded).reshape(-1)
        order = torch.argsort(marked, stable=True)
        counts = Counter(marked[order].tolist())
        unused = counts.pop(padded, 0)
        return order[: len(order) - unused], dict(counts)

    def dense(self, num_experts: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """``psi`` as ``[T, E * h]``: for tests and small problems only."""
        out = torch.zeros(self.num_tokens, num_experts, self.d_hidden, dtype=dtype, device=self.key.device)
        for block in self.design(dtype):
            out[block.rows, block.expert] += block.z.T
        return out.flatten(1)

    def to(self, device: torch.device | str) -> RoutedKeys:
        """The same keys on another device."""
        return RoutedKeys(self.expert.to(device), self.gate.to(device), self.key.to(device))

    def rows(self, tokens: slice) -> RoutedKeys:
        """Some tokens, as views."""
        return RoutedKeys(self.expert[tokens], self.gate[tokens], self.key[tokens])

    @staticmethod
    def cat(parts: list[RoutedKeys]) -> RoutedKeys:
        """Rows of several batches, one after the other; a smaller K is padded with zero gates."""
        width = max(p.expert.shape[1] for p in parts)
        wide = [p if p.expert.shape[1] == width else p._padded(width - p.expert.shape[1]) for p in parts]
        expert, gate, key = ([getattr(p, name) for p in wide] for name in ("expert", "gate", "key"))
        return RoutedKeys(torch.cat(expert), torch.cat(gate), torch.cat(key))

    def _padded(self, count: int) -> RoutedKeys:
        """With so many slots more, of zero gates."""
        pad = torch.nn.functional.pad
        return RoutedKeys(pad(self.expert, (0, count)), pad(self.gate, (0, count)), pad(self.key, (0, 0, 0, count)))


@dataclass(frozen=True)
class ExpertDesign:
    """The block of the design that belongs to one expert.

    Attributes:
        expert: index j.
        rows: ``[T_j]`` int64, the tokens that reach it.
        z: ``[h, T_j]``, their gated keys ``Z_j``.
        slots: ``[T_j]`` int64, where these keys lie among the T * K slots.
    """

    expert: int
    rows: Tensor
    z: Tensor
    slots: Tensor


@dataclass(frozen=True)
class FactoredUpdate:
    """An update ``Delta[E, d, h]`` in factored form: ``Delta_j = left[:, columns_j] @ right_j^T``.

    Experts that are not listed have a zero update.

    Attributes:
        left: ``[d, C]``.
        experts: the experts with an update, increasing.
        columns: per listed expert, ``[r_j]`` int64 columns of ``left``.
        right: per listed expert, ``[h, r_j]``.
    """

    left: Tensor
    experts: tuple[int, ...]
    columns: tuple[Tensor, ...]
    right: tuple[Tensor, ...]

    @property
    def d_model(self) -> int:
        """Height d of the update."""
        return self.left.shape[0]

    @property
    def d_hidden(self) -> int:
        """Width h; 0 where no expert has an update."""
        return self.right[0].shape[0] if self.right else 0

    @property
    def rank(self) -> int:
        """Columns of the expert with the most."""
        return max((len(columns) for columns in self.columns), default=0)

    @property
    def device(self) -> torch.device:
        """Where the factors lie."""
        return self.left.device

    def rights(self, start: int, stop: int) -> list[Tensor]:
        """Right factors of the experts at these places."""
        return list(self.right[start:stop])

    def deltas(self) -> Iterator[tuple[int, Tensor]]:
        """``(j, Delta_j [d, h])`` one expert at a time, so that the dense update never exists whole."""
        for expert, columns, right in zip(self.experts, self.columns, self.right, strict=True):
            yield expert, self.left[:, columns] @ right.T

    def dense(self, num_experts: int) -> Tensor:
        """``Delta`` as ``[E, d, h]``: for tests and small problems only."""
        out = torch.zeros(num_experts, self.d_model, self.d_hidden, dtype=self.left.dtype, device=self.left.device)
        for expert, delta in self.deltas():
            out[expert] = delta
        return out

    def scale(self, factor: float) -> FactoredUpdate:
        """``factor * Delta``."""
        return FactoredUpdate(self.left * factor, self.experts, self.columns, self.right)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> FactoredUpdate:
        """The same update in another dtype or on another device."""
        return FactoredUpdate(
            self.left.to(device=device, dtype=dtype),
            self.experts,
            tuple(c.to(device=device) for c in self.columns),
            tuple(r.to(device=device, dtype=dtype) for r in self.right),
        )

    def is_finite(self) -> bool:
        """Whether every factor is finite."""
        return bool(torch.stack([torch.isfinite(factor).all() for factor in (self.left, *self.right)]).all())

    def apply(self, keys: RoutedKeys) -> Tensor:
        """``sum_j g_tj Delta_j k_tj`` as ``[T, d]``: how much the update moves each token's MoE output."""
        out = torch.zeros(keys.num_tokens, self.left.shape[0], dtype=self.left.dtype, device=self.left.device)
        by_expert = dict(zip(self.experts, zip(self.columns, self.right, strict=True), strict=True))
        for block in keys.design(self.left.dtype):
            if block.expert in by_expert:
                columns, right = by_expert[block.expert]
                moved = self.left[:, columns] @ (right.T @ block.z)
                out.index_add_(0, block.rows, moved.T)
        return out
