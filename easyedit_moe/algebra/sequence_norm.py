"""Normalisation by running statistics over a life of edits (UltraEdit, arXiv 2505.14679), lifted to experts (pure).

UltraEdit keeps running means and deviations of the features ``[key || value gradient]`` of all edits so far, and
solves ``min sum_t || v_t - Delta k_t ||^2 + ||Delta||^2`` for ``v_t = -eta ||k^_t||^2 g^_t``, with key k^ and gradient
g^ normalised by them. Here the residual, which is the wanted change itself, stands for the negative gradient, and each
expert has the statistics of its own gated keys:

    v_t = eta * e_t * s * (r_t - mean_r) / (dev_r + eps),
    e_t = mean over the token's experts and dimensions of ((g k - mean_j) / (dev_j + eps))^2.

The unit s, the residuals' root mean square deviation, is ours: it makes eta = 1 leave residuals as large as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.errors import NumericalError

EPS = 1e-8


@dataclass(frozen=True)
class Running:
    """Mean and summed squared deviation of G groups of vectors, merged as Chan, Golub and LeVeque do.

    Attributes:
        count: ``[G]`` float64.
        mean: ``[G, w]`` float64.
        square: ``[G, w]`` float64, ``sum (x - mean)^2``.
    """

    count: Tensor
    mean: Tensor
    square: Tensor

    @staticmethod
    def empty(groups: int, width: int, device: torch.device | str = "cpu") -> Running:
        """Of no vectors."""
        zeros = torch.zeros(groups, width, dtype=torch.float64, device=device)
        return Running(zeros[:, 0].clone(), zeros, zeros.clone())

    def with_values(self, values: Tensor, group: Tensor) -> Running:
        """With ``values [n, w]`` more, of the groups ``[n]`` int64.

        Raises:
            NumericalError: a value that is not finite.
        """
        x = values.to(self.mean)
        if not torch.isfinite(x).all():
            raise NumericalError("Keys or residuals hold NaN or infinity, so their running statistics are none.")
        more = torch.zeros_like(self.count).index_add_(0, group, torch.ones_like(x[:, 0]))
        mean = torch.zeros_like(self.mean).index_add_(0, group, x) / more.clamp_min(1)[:, None]
        square = torch.zeros_like(self.square).index_add_(0, group, (x - mean[group]) ** 2)
        total = self.count + more
        apart, share = mean - self.mean, (more / total.clamp_min(1))[:, None]
        return Running(
            total,
            self.mean + apart * share,
            self.square + square + apart**2 * (self.count[:, None] * share),
        )

    def normalised(self, values: Tensor, group: Tensor) -> Tensor:
        """``(x - mean) / (deviation + eps)``; of a group with fewer than two values, the values themselves."""
        x = values.to(self.mean)
        deviation = (self.square / self.count.clamp_min(1)[:, None]).sqrt()
        apart = (x - self.mean[group]) / (deviation[group] + EPS)
        return torch.where((self.count[group] > 1)[:, None], apart, x)

    def scale(self) -> float:
        """Root mean square deviation over all groups and dimensions; 1 where no group has two values."""
        many = self.count > 1
        if not many.any():
            return 1.0
        return float((self.square[many] / self.count[many, None]).mean().sqrt())


def sequence_normalised(
    keys: RoutedKeys, residual: Tensor, running_keys: Running, running_residuals: Running, rate: float
) -> tuple[Tensor, Running, Running]:
    """``v [T, d]`` of the module's equation, and the statistics with these rows in them, which it is made with.

    Args:
        keys: of T tokens.
        residual: ``[T, d]``.
        running_keys: of earlier edits' gated keys, a group per expert.
        running_residuals: of their residuals, one group.
        rate: eta.

    Raises:
        NumericalError: keys or residuals that are not finite.
    """
    used = (keys.gate != 0).reshape(-1)
    expert = keys.expert.reshape(-1)[used]
    gated = (keys.key.to(torch.float64) * keys.gate.to(torch.float64).unsqueeze(-1)).reshape(-1, keys.d_hidden)[used]
    token = torch.arange(keys.num_tokens, device=expert.device).repeat_interleave(keys.expert.shape[1])[used]
    one = torch.zeros(keys.num_tokens, dtype=torch.long, device=expert.device)
    running_keys = running_keys.with_values(gated, expert)
    running_residuals = running_residuals.with_values(residual, one)
    energy = gated.new_zeros(keys.num_tokens)
    energy.index_add_(0, token, (running_keys.normalised(gated, expert) ** 2).mean(1))
    slots = torch.zeros_like(energy).index_add_(0, token, torch.ones_like(energy[token]))
    moved = running_residuals.normalised(residual, one) * (rate * running_residuals.scale())
    return moved * (energy / slots.clamp_min(1))[:, None], running_keys, running_residuals
