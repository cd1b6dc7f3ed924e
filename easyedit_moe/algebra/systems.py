"""Linear systems with a ridge, in float64 by Cholesky: factored in place, and singular ones are found out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from easyedit_moe.errors import HyperParamsError, NumericalError

SYSTEM_DTYPE = torch.float64


CHUNK = 2**23
"""Numbers in a temporary of the accumulated Gram matrices (64 MB in float64)."""


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


def factor_ridges(grams: Sequence[Tensor], lambda_reg: float) -> list[Tensor]:
    """`factor_ridge` of several small matrices on one device, padded and at once; raises as there, for the first."""
    check_lambda(lambda_reg)
    if not grams:
        return []
    sizes = [len(gram) for gram in grams]
    side, device = max(sizes), grams[0].device
    pad = torch.nn.functional.pad
    stacked = torch.stack([pad(gram, (0, side - n, 0, side - n)) for gram, n in zip(grams, sizes, strict=True)])
    if not torch.isfinite(stacked).all():
        raise keys_not_finite()
    free = torch.tensor(sizes, device=device)[:, None] <= torch.arange(side, device=device)
    diagonal = torch.diagonal(stacked, dim1=1, dim2=2)
    diagonal.add_(free.to(stacked) + lambda_reg * (~free).to(stacked))
    factors, failed = torch.linalg.cholesky_ex(stacked)
    # What was not positive definite has no inverse, and is told below.
    invertible = torch.where((failed == 0)[:, None, None], factors, torch.eye(side).to(factors))
    limit = torch.tensor([inflation_limit(n) for n in sizes], dtype=stacked.dtype, device=device)[:, None]
    inflation = diagonal * torch.diagonal(torch.cholesky_inverse(invertible), dim1=1, dim2=2)
    # As in `cholesky_`, the bound by the ridge settles it where it can.
    regular = (inflation <= limit) | (diagonal <= limit * lambda_reg) | free
    bad = ((failed != 0) | ~regular.all(1)).tolist()
    if any(bad):
        raise singular_system(sizes[bad.index(True)], lambda_reg)
    return [factor[:n, :n] for factor, n in zip(factors, sizes, strict=True)]


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


def check_dual_ridge(energy: Tensor, unknowns: int, lambda_reg: float) -> None:
    """NumericalError where the dual of a primal system, ``energy`` its diagonal, would count as singular."""
    tokens = len(energy)
    if tokens > unknowns and float(energy.max()) > inflation_limit(tokens) * lambda_reg:
        raise singular_system(tokens, lambda_reg)
