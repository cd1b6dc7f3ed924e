"""Linear systems with a ridge, in float64 by Cholesky: factored in place, and singular ones are found out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_moe.errors import HyperParamsError, NumericalError

SYSTEM_DTYPE = torch.float64


CHUNK = 2**23
"""Numbers in a temporary of the accumulated Gram matrices (64 MB in float64)."""
LARGEST = 32
"""Largest system that is padded and solved along with others: larger ones fill a device by themselves."""


def inflation_limit(size: int) -> float:
    """Bound on ``A_ii (A^{-1})_ii`` up to which a system of this size is regular in float64."""
    return 0.1 / (max(size, 1) * torch.finfo(SYSTEM_DTYPE).eps)


def cholesky_(matrix: Tensor, floor: float = 0.0) -> Tensor | None:
    """Lower Cholesky factor in the memory of ``matrix`` (square, contiguous), or None where it is not positive
    definite to working precision. ``floor`` is a known lower bound on the eigenvalues of the exact matrix.

    Rounding can leave a singular matrix with tiny positive pivots, and its "solution" would be noise of size 1 / eps.
    ``A_ii (A^{-1})_ii`` says how much of row i the others do not explain, whatever the rows' scale. It is at most
    ``A_ii / floor``, and only where that does not settle it, the inverse is computed.
    """
    diagonal = torch.diagonal(matrix).clone()
    # The transpose of a contiguous matrix is in LAPACK's order, so it is factored where it lies.
    target, failed = matrix.mT, torch.empty((), dtype=torch.int32, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(target, out=(target, failed))
    if failed:
        return None
    limit = inflation_limit(len(matrix))
    if len(matrix) == 0 or (floor > 0 and float(diagonal.max()) <= limit * floor):
        return factor
    inflation = diagonal * torch.diagonal(torch.cholesky_inverse(factor))
    return factor if (inflation <= limit).all() else None


def solve_factored(factor: Tensor, right: Tensor) -> Tensor:
    """``(L L^T)^{-1} right``; unlike ``torch.cholesky_solve`` without a copy of the factor."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def factor_ridge(gram: Tensor, lambda_reg: float) -> Tensor:
    """Cholesky factor of ``gram + lambda I``, which is left as it is.

    Raises:
        HyperParamsError: a negative or infinite lambda. NumericalError: a matrix that is not positive definite.
    """
    return factor_ridge_(gram.clone(memory_format=torch.contiguous_format), lambda_reg)


def factor_ridge_(gram: Tensor, lambda_reg: float) -> Tensor:
    """As `factor_ridge`, in the memory of ``gram``."""
    check_lambda(lambda_reg)
    if not math.isfinite(float(gram.sum())) and not torch.isfinite(gram).all():
        raise keys_not_finite()
    torch.diagonal(gram).add_(lambda_reg)
    factor = cholesky_(gram, lambda_reg)
    if factor is None:
        raise singular_system(len(gram), lambda_reg)
    return factor


@dataclass(frozen=True)
class Factored:
    """Cholesky factors of several matrices side by side; whether there are any is not known before `regular` reads it.

    Attributes:
        factors: ``[c, n, n]``, lower.
        diagonal: ``[c, n]``, the matrices' own.
        finite: ``[c]`` bool, whether a matrix holds no NaN or infinity.
        failed: ``[c]`` int32, 0 where LAPACK found a factor.
    """

    factors: Tensor
    diagonal: Tensor
    finite: Tensor
    failed: Tensor


def factor_stack_(matrices: Tensor) -> Factored:
    """Factors of ``matrices [c, n, n]`` (contiguous) in their memory; the CPU waits for nothing."""
    diagonal = torch.diagonal(matrices, dim1=1, dim2=2).clone()
    finite = torch.isfinite(matrices).flatten(1).all(1)
    # As in `cholesky_`, in LAPACK's order.
    target = matrices.mT
    failed = torch.empty(len(matrices), dtype=torch.int32, device=matrices.device)
    factors, failed = torch.linalg.cholesky_ex(target, out=(target, failed))
    return Factored(factors, diagonal, finite, failed)


def regular(parts: Sequence[Factored], sizes: Sequence[int], floor: float) -> tuple[list[bool], list[bool]]:
    """Per matrix of all parts whether it is finite, and whether it is positive definite to working precision.

    Args:
        parts: on one device; matrices may be filled up with ones on the diagonal.
        sizes: of each matrix, what fills it up left out.
        floor: as in `cholesky_`, whose bounds these are.
    """
    if not sizes:
        return [], []
    limits = torch.tensor([inflation_limit(size) for size in sizes], dtype=SYSTEM_DTYPE, device=parts[0].factors.device)
    bounds = limits[:, None].split([len(part.factors) for part in parts])
    settled = [(part.diagonal <= bound * floor).all(1) for part, bound in zip(parts, bounds, strict=True)]
    flags = [torch.stack([p.finite, p.failed == 0, s]) for p, s in zip(parts, settled, strict=True)]
    finite, found, fine = torch.cat(flags, 1).tolist()
    # Only what the floor does not settle is inverted, and only then is there a second read.
    places, asked, start = [], [], 0
    for part, bound in zip(parts, bounds, strict=True):
        for number in range(len(part.factors)):
            if found[start + number] and not fine[start + number]:
                places.append(start + number)
                asked.append(_not_inflated(part, number, bound[number], floor))
        start += len(part.factors)
    if asked:
        for place, good in zip(places, torch.stack(asked).tolist(), strict=True):
            fine[place] = good
    return finite, [one and other for one, other in zip(found, fine, strict=True)]


def check_factored(parts: Sequence[Factored], sizes: Sequence[int], lambda_reg: float) -> None:
    """NumericalError where what was factored with this ridge is not `regular`; all of it is read at once."""
    finite, good = regular(parts, sizes, lambda_reg)
    if not all(finite):
        raise keys_not_finite()
    if not all(good):
        raise singular_system(sizes[good.index(False)], lambda_reg)


def _not_inflated(part: Factored, number: int, limit: Tensor, floor: float) -> Tensor:
    """Whether one matrix is regular, by its inverse; not `torch.cholesky_inverse`, which says at once if it failed."""
    factor, diagonal = part.factors[number], part.diagonal[number]
    unit = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    half = torch.linalg.solve_triangular(factor, unit, upper=False)
    inflation = diagonal * torch.linalg.vector_norm(half, dim=0) ** 2
    return ((inflation <= limit) | (diagonal <= limit * floor)).all()


def size_classes(sizes: Sequence[int]) -> list[list[int]]:
    """Places of matrices that are filled up to one size: small ones, up to `LARGEST`, together, larger ones by an
    eighth of the power of two below them, so that at most 27 % of their numbers are added.
    """
    found: dict[int, list[int]] = {}
    for place, size in enumerate(sizes):
        step = LARGEST if size <= LARGEST else 2 ** (size.bit_length() - 4)
        found.setdefault(max(step, -(-size // step) * step), []).append(place)
    return list(found.values())


def factor_ridges(grams: Sequence[Tensor], lambda_reg: float) -> list[Tensor]:
    """`factor_ridge` of several matrices on one device, at once by `size_classes`; raises as there.

    However many there are, the CPU waits for the device twice, and once more where lambda is next to nothing.
    """
    return factor_made_ridges([len(gram) for gram in grams], lambda place: grams[place], lambda_reg)


def factor_made_ridges(sizes: Sequence[int], made: Callable[[int], Tensor], lambda_reg: float) -> list[Tensor]:
    """As `factor_ridges`, of matrices of these sides that are ``made`` one by one, and held as factors only."""
    check_lambda(lambda_reg)
    parts: list[Factored] = []
    order: list[int] = []
    for places in size_classes(sizes):
        side = max(sizes[place] for place in places)
        most = max(1, CHUNK // max(1, side * side))
        for start in range(0, len(places), most):
            some = places[start : start + most]
            for number, place in enumerate(some):
                gram, size = made(place), sizes[place]
                if number == 0:
                    stacked = gram.new_zeros(len(some), side, side)
                own = stacked[number]
                own[:size, :size] = gram
                torch.diagonal(own)[:size].add_(lambda_reg)
                torch.diagonal(own)[size:].fill_(1)
            parts.append(factor_stack_(stacked))
            order += some
    check_factored(parts, [sizes[place] for place in order], lambda_reg)
    every = [factor for part in parts for factor in part.factors]
    found = {place: factor[: sizes[place], : sizes[place]] for place, factor in zip(order, every, strict=True)}
    return [found[place] for place in range(len(sizes))]


def check_lambda(lambda_reg: float) -> None:
    """HyperParamsError for a negative or infinite lambda."""
    if not 0 <= lambda_reg < float("inf"):
        raise HyperParamsError(f"lambda_reg must be finite and >= 0; found {lambda_reg}.")


def keys_not_finite() -> NumericalError:
    """The error for keys or gates that are not finite."""
    return NumericalError("The keys of these requests hold NaN or infinity: the model's weights are not finite.")


def singular_system(size: int, lambda_reg: float) -> NumericalError:
    """The error for a system of side ``size`` that this lambda leaves singular."""
    return NumericalError(
        f"The {size} x {size} system is singular at lambda_reg {lambda_reg}: some requests "
        "share a key, or have none left in the null space. Raise lambda_reg."
    )


def finite_residual(residual: Tensor) -> Tensor:
    """``residual`` in float64, or NumericalError where it is not finite."""
    if not torch.isfinite(residual).all():
        raise NumericalError(
            "The residuals hold NaN or infinity: the target vectors or the hidden states are not finite."
        )
    return residual.to(SYSTEM_DTYPE)


def resolve_form(form: str, tokens: int, unknowns: int, lambda_reg: float) -> str:
    """The form itself, "dual" or "primal"; for "auto" the one with the smaller system, primal only with a ridge.

    Raises:
        HyperParamsError: an unknown form.
    """
    if form == "auto":
        return "primal" if unknowns < tokens and lambda_reg > 0 else "dual"
    if form not in ("dual", "primal"):
        raise HyperParamsError(f"form must be auto, dual or primal; found {form!r}.")
    return form


def check_dual_ridges(energies: Sequence[Tensor], unknowns: Sequence[int], lambda_reg: float) -> None:
    """NumericalError where the dual of a primal system would count as singular; all are read at once.

    Args:
        energies: ``[T]`` of each system, the diagonal of its dual.
        unknowns: of each, the side of the primal system.
        lambda_reg: the ridge.
    """
    asked = [energy for energy, number in zip(energies, unknowns, strict=True) if len(energy) > number]
    if not asked:
        return
    for energy, largest in zip(asked, torch.stack([energy.max() for energy in asked]).tolist(), strict=True):
        if largest > inflation_limit(len(energy)) * lambda_reg:
            raise singular_system(len(energy), lambda_reg)


def total_of(parts: Sequence[Tensor]) -> float:
    """Sum of numbers on a device in their order; they are read at once, as each read waits for it."""
    return sum(torch.stack(list(parts)).tolist(), 0.0) if parts else 0.0


def moved_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one dtype on another device by one transfer, for which the CPU waits once; there, they are as is."""
    if all(tensor.device == device for tensor in tensors):
        return list(tensors)
    return unpacked(packed(tensors).to(device), [tensor.shape for tensor in tensors])


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """``[n]``, the numbers of all, one after the other."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unpacked(numbers: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Views of these shapes on `packed` numbers."""
    parts = numbers.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
