"""The gauge in which one layer's Tucker factors take another layer's core (pure, torch only).

A basis is known up to a rotation of each factor's columns: eigenvectors come with any sign, and those of (near-)equal
eigenvalues in any combination. Within one layer nothing depends on it, since the core turns along. A core that is
mapped back by *another* layer's factors (MoTE paper, eq. 14) does depend on it, and the paper does not say which
rotation is meant. Here it is the one that brings the other layer's factors nearest to those of the core's own layer.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from easyedit_moe.algebra.tucker import TuckerBasis
from easyedit_moe.errors import HyperParamsError

NO_COUNTERPART = 1e-8
"""Cosine of a principal angle between two spans up to which a direction counts as without counterpart."""


def orthonormal_factor(factor: Tensor) -> Tensor:
    """``W = U (U^T U)^{-1/2} [n, r]`` in float64: the orthonormal basis of U's span that lies nearest to U.

    It turns along with U's columns, and is U where they are orthonormal already. What U is not of full rank for is 0.
    """
    left, values, right = torch.linalg.svd(factor.to(torch.float64), full_matrices=False)
    known = values > values[:1] * torch.finfo(torch.float64).eps * max(factor.shape)
    return left[:, known] @ right[known]


def aligned_factor(factor: Tensor, reference: Tensor) -> Tensor:
    """``U Q [n, s]`` in float64, Q the solution of the orthogonal Procrustes problem ``min ||W Q - W'||``.

    W and W' are the orthonormal bases of both spans (`orthonormal_factor`), which are U and V unless these were
    re-coloured after whitening. ``Q = A B^T`` from the singular value decomposition ``W^T W' = A C B^T``, C the cosines
    of the principal angles. A rotation of U's columns turns Q against it, and one of V's turns the result along:
    ``U Q`` is known by ``U U^T`` and V alone, whatever LAPACK made of them. Where both spans are the whole space, it is
    ``(U U^T)^{1/2} W'``: V itself for orthonormal columns.

    Directions of V that U has no counterpart of (`NO_COUNTERPART`), or not enough columns for, are mapped to 0: for
    them no Q is nearer than another.

    Args:
        factor: U ``[n, r]``, any float dtype.
        reference: V ``[n, s]``.

    Raises:
        HyperParamsError: the modes have different sizes, so that no rotation brings one to the other.
    """
    if len(factor) != len(reference):
        raise HyperParamsError(
            f"A layer with a mode of size {len(factor)} can't take the core of one where it has {len(reference)}: "
            "spread 'update' needs layers with experts of one shape. Choose other layers, or spread: residual."
        )
    wanted = orthonormal_factor(reference.to(factor.device))
    left, cosines, right = torch.linalg.svd(orthonormal_factor(factor).mT @ wanted, full_matrices=False)
    known = cosines > NO_COUNTERPART
    return factor.to(torch.float64) @ (left[:, known] @ right[known])


def aligned_basis(basis: TuckerBasis, reference: TuckerBasis) -> TuckerBasis:
    """The same spans in the gauge of ``reference``, in which its cores are mapped back; see `aligned_factor`.

    Raises:
        HyperParamsError: the layers' experts differ in number or shape.
    """
    return replace(
        basis,
        u_expert=aligned_factor(basis.u_expert, reference.u_expert),
        u_out=aligned_factor(basis.u_out, reference.u_out),
        u_in=aligned_factor(basis.u_in, reference.u_in),
    )
