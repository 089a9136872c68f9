"""Least squares: the ridge refit of a projection in closed form, and conjugate gradients.

In: micro-batches of a projection's inputs and targets, or a linear operator. Out: the weight that
minimises the squared error.

Memory: one Gram matrix ``[C, C]`` and the cross moments ``[H, C]``, which the refit weight
overwrites.

Shape suffixes: H outputs of a projection, C its inputs, R some rows of H, T tokens of a
micro-batch, B its windows, S tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from frugal_bonsai.accelerator import sum_dtype
from frugal_bonsai.bonsai.importance.factor import DampedFactor
from frugal_bonsai.bonsai.importance.gram import Moments, add_product_
from frugal_bonsai.memory.work import refit_rows


class LeastSquares:
    """The problem ``argmin ||T - X W'^T||^2 + lambda ||W' - W||^2`` of one projection.

    Attributes:
        moments: of the inputs X.
        weight_HC: fp32 sum of T^T X, which :meth:`solve_` overwrites with W'.

    Args:
        anchor_HC: W, the present weight, in any floating dtype.
    """

    def __init__(self, anchor_HC: torch.Tensor) -> None:
        self._anchor_HC, device = anchor_HC, anchor_HC.device
        self.moments = Moments(anchor_HC.shape[1], device=device, gram=True)
        self.weight_HC = torch.zeros(anchor_HC.shape, device=device)
        self._energy = torch.zeros((), dtype=sum_dtype(device), device=device)

    def add_targets(self, input_BSC: torch.Tensor, target_BSH: torch.Tensor) -> None:
        """Add a micro-batch to T^T X: all of it, or nothing when memory runs out."""
        target_TH = target_BSH.flatten(0, 1)
        energy = torch.linalg.vector_norm(target_TH, dtype=self._energy.dtype).square()
        add_product_(self.weight_HC, target_TH, input_BSC.flatten(0, 1))
        self._energy += energy

    def solve_(self, ridge: float, *, where: str) -> float:
        """Solve in place; return the share of the targets' energy that W' does not explain.

        Args:
            ridge: lambda as a share of the Gram matrix's mean diagonal.
            where: name for error messages.
        """
        factor = self.moments.factor(ridge, where=where)
        explained = ridge_refit_(factor, self.weight_HC, self._anchor_HC)
        return 1.0 - explained / max(float(self._energy), 1e-300)


def ridge_refit_(factor: DampedFactor, cross_HC: torch.Tensor, anchor_HC: torch.Tensor) -> float:
    """Overwrite T^T X by W', given the factor of X^T X + lambda I and the present weight W.

    Returns the energy of T that W' explains: ``2 <X W'^T, T> - ||X W'^T||^2``.
    """
    explained, rows = 0.0, refit_rows(cross_HC.device.type)
    for start in range(0, len(cross_HC), rows):
        cross_RC = cross_HC[start : start + rows]
        anchor_RC = anchor_HC[start : start + rows].float()
        # The change D = W' - W solves D (G + lambda I) = T^T X - W G.
        change_RC = factor.solve(cross_RC - factor.times_gram(anchor_RC))
        refit_RC = anchor_RC + change_RC
        # W' G = T^T X - lambda D reduces the explained energy to two inner products.
        explained += float((refit_RC * cross_RC).sum())
        explained += factor.added * float((refit_RC * change_RC).sum())
        cross_RC.copy_(refit_RC)
    return explained


def conjugate_gradients(
    operator: Callable[[torch.Tensor], torch.Tensor], right: torch.Tensor, iterations: int
) -> torch.Tensor:
    """Solve ``operator(x) = right`` from zero (Hestenes and Stiefel 1952).

    Args:
        operator: symmetric and positive definite.
        right: right side, any shape.
        iterations: maximum number of iterations; fewer where the residual becomes zero.
    """
    solution = torch.zeros_like(right)
    residual, direction = right.clone(), right.clone()
    size = _square_norm(residual)
    for _ in range(iterations):
        if size == 0.0:
            break
        image = operator(direction)
        length = size / float((direction * image).sum(dtype=sum_dtype(right.device)))
        solution.add_(direction, alpha=length)
        residual.sub_(image, alpha=length)
        before, size = size, _square_norm(residual)
        direction.mul_(size / before).add_(residual)
    return solution


def _square_norm(value: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=sum_dtype(value.device))) ** 2
