"""Gram matrices of the inputs of output projections, and solves with them.

In: micro-batches of inputs. Out: second moments, and the two closed forms that the method takes
from them: the exact layerwise loss of removing a unit, and the refit of a projection. Holds one
``[C, C]`` fp32 matrix a group (for Llama-3-8B's FFN 0.8 GB), on the compute device.

Shape suffixes: C columns of an output projection, U units, H hidden, T tokens.
"""

from __future__ import annotations

import torch

from frugal_bonsai.errors import CheckpointError

_LARGEST_DAMPING = 1.0


class Moments:
    """Running sums over tokens of one group's inputs x: x, x^2 and, if asked for, x x^T."""

    def __init__(self, columns: int, *, device: torch.device, gram: bool) -> None:
        self.tokens = 0
        self.sum_C = torch.zeros(columns, dtype=torch.float64, device=device)
        self.square_C = torch.zeros(columns, dtype=torch.float64, device=device)
        self.gram_CC = torch.zeros(columns, columns, device=device) if gram else None

    def add(self, input_BSC: torch.Tensor) -> None:
        """Add one micro-batch's inputs."""
        input_TC = input_BSC.flatten(0, 1).float()
        self.tokens += len(input_TC)
        self.sum_C += input_TC.sum(0)
        if self.gram_CC is None:
            self.square_C += input_TC.square().sum(0)
        else:
            self.gram_CC.addmm_(input_TC.T, input_TC)

    @property
    def mean_square_C(self) -> torch.Tensor:
        """E[x^2] of each column, float64."""
        total = self.square_C if self.gram_CC is None else self.gram_CC.diagonal().double()
        return total / self.tokens

    @property
    def variance_C(self) -> torch.Tensor:
        """Var[x] of each column, float64."""
        return (self.mean_square_C - (self.sum_C / self.tokens).square()).clamp_min(0)


def damped_factor(gram_CC: torch.Tensor, damping: float, *, where: str) -> torch.Tensor:
    """Cholesky factor of ``gram + damping * mean(diagonal) * I``.

    A matrix that is not positive definite in fp32 gets ten times the damping, until it is.

    Raises:
        CheckpointError: the matrix is not finite, so the model's activations are not.
    """
    scale = gram_CC.diagonal().mean().clamp_min(torch.finfo(gram_CC.dtype).tiny)
    if not bool(torch.isfinite(scale)):
        raise CheckpointError(
            f"{where}: activations are not finite; the model overflows on this text in this "
            f"precision, try --weights native or another calibration text"
        )
    while damping <= _LARGEST_DAMPING:
        damped_CC = gram_CC.clone()
        damped_CC.diagonal().add_(damping * scale)
        factor = torch.linalg.cholesky_ex(damped_CC)
        if int(factor.info) == 0:
            factor_CC: torch.Tensor = factor.L
            return factor_CC
        damping *= 10
    raise CheckpointError(f"{where}: the Gram matrix of its inputs is not positive definite")


def exact_loss_U(
    gram_CC: torch.Tensor,
    weight_HC: torch.Tensor,
    columns_per_unit: int,
    *,
    damping: float,
    where: str,
) -> torch.Tensor:
    """What optimal compensation cannot give back when one unit goes: fp32 ``[U]``, summed over H.

    For a column ``||w_j||^2 / [G^-1]_jj``, for a block g of columns
    ``trace(W_g ([G^-1]_gg)^-1 W_g^T)`` (optimal brain surgeon: Hassibi and Stork 1993; layerwise:
    Frantar and Alistarh 2022).

    Args:
        gram_CC: E[x x^T].
        weight_HC: the projection's weight.
        columns_per_unit: columns that one unit owns.
        damping: share of the mean diagonal that is added to the diagonal.
        where: name for error texts.
    """
    inverse_CC = torch.cholesky_inverse(damped_factor(gram_CC, damping, where=where))
    if columns_per_unit == 1:
        return weight_HC.float().square().sum(0) / inverse_CC.diagonal()
    units = len(gram_CC) // columns_per_unit
    losses = []
    for unit in range(units):
        own = slice(unit * columns_per_unit, (unit + 1) * columns_per_unit)
        block_HK = weight_HC[:, own].float()
        solved_KH = torch.linalg.solve(inverse_CC[own, own], block_HK.T)
        losses.append((block_HK.T * solved_KH).sum())
    return torch.stack(losses)


def stand_in_matrix(
    gram_CC: torch.Tensor, pool_P: torch.Tensor, *, damping: float, where: str
) -> torch.Tensor:
    """``B`` such that the best linear guess of the pool's inputs is ``x_core B^T``: ``[P, C-P]``.

    A projection whose removed inputs are replaced by that guess is the projection after optimal
    compensation by the columns outside the pool.

    Args:
        gram_CC: x x^T, summed or averaged.
        pool_P: int64, columns to guess; the others, in order, are the core.
        damping: share of the core's mean diagonal that is added to it.
        where: name for error texts.
    """
    core_C = torch.ones(len(gram_CC), dtype=torch.bool, device=gram_CC.device)
    core_C[pool_P] = False
    core = core_C.nonzero().flatten()
    factor = damped_factor(gram_CC[core][:, core], damping, where=where)
    return torch.cholesky_solve(gram_CC[core][:, pool_P], factor).T.contiguous()


def ridge_refit(
    gram_CC: torch.Tensor,
    cross_CH: torch.Tensor,
    anchor_HC: torch.Tensor,
    *,
    ridge: float,
    where: str,
) -> torch.Tensor:
    """``argmin ||T - X W'^T||^2 + lambda ||W' - W||^2``: the refit weight ``[H, C]``.

    Args:
        gram_CC: X^T X.
        cross_CH: X^T T.
        anchor_HC: W, the weight to stay close to.
        ridge: lambda as a share of the Gram matrix's mean diagonal.
        where: name for error texts.
    """
    anchor_CH = anchor_HC.float().T
    # In terms of the change D = W' - W: (G + lambda I) D = X^T T - G W.
    wanted_CH = cross_CH - gram_CC @ anchor_CH
    factor_CC = damped_factor(gram_CC, ridge, where=where)
    return (anchor_CH + torch.cholesky_solve(wanted_CH, factor_CC)).T.contiguous()
