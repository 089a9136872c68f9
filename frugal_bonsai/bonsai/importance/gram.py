"""Gram matrices of the inputs of output projections, and solves with them.

In: micro-batches of inputs. Out: second moments, and the two closed forms that the method takes
from them: the exact layerwise loss of removing a unit, and the refit of a projection. Holds one
``[C, C]`` fp32 matrix a group (for Llama-3-8B's FFN 0.8 GB), on the compute device, which is
factorised and inverted where it lies (factor.py).

Shape suffixes: C columns of an output projection, U units, H hidden, R some rows of H, T tokens.
"""

from __future__ import annotations

import torch

from frugal_bonsai.accelerator import CUDA, sum_dtype
from frugal_bonsai.bonsai.importance.factor import DampedFactor
from frugal_bonsai.memory.work import refit_rows

# Columns of a weight whose norms are taken together.
_COLUMNS = 128


def add_product_(sum_MN: torch.Tensor, left_TM: torch.Tensor, right_TN: torch.Tensor) -> None:
    """Add ``left^T right`` over tokens to an fp32 sum, in place.

    CUDA multiplies 16-bit factors as they are and sums in fp32: a product of two of them is exact
    in fp32, so nothing is lost against factors that are converted first, which take a tenth of the
    rate and twice the memory.

    Args:
        sum_MN: fp32 ``[M, N]``, contiguous.
        left_TM: ``[T, M]`` in the compute dtype.
        right_TN: ``[T, N]``, the same.
    """
    half = left_TM.dtype == right_TN.dtype and left_TM.dtype.itemsize == 2
    if half and sum_MN.device.type == CUDA:
        torch.addmm(sum_MN, left_TM.T, right_TN, out_dtype=torch.float32, out=sum_MN)
    else:
        left_TM, right_TN = left_TM.float(), right_TN.float()
        sum_MN.addmm_(left_TM.T, right_TN)


class Moments:
    """Running sums over tokens of one group's inputs x: x, x^2 and, if asked for, x x^T."""

    def __init__(self, columns: int, *, device: torch.device, gram: bool) -> None:
        self.tokens = 0
        self._dtype = sum_dtype(device)
        self.sum_C = torch.zeros(columns, dtype=self._dtype, device=device)
        self.square_C = torch.zeros(columns, dtype=self._dtype, device=device)
        self.gram_CC = torch.zeros(columns, columns, device=device) if gram else None
        self._factor: DampedFactor | None = None

    def add(self, input_BSC: torch.Tensor, *, tokens: int | None = None) -> None:
        """Add one micro-batch's inputs: all of it, or nothing when memory runs out.

        Args:
            input_BSC: the inputs.
            tokens: of which these are some, the others' inputs being zero; None: these are all.
        """
        input_TC = input_BSC.flatten(0, 1)
        sum_C = input_TC.sum(0, dtype=torch.float32)
        if self.gram_CC is None:
            self.square_C += input_TC.float().square().sum(0)
        else:
            add_product_(self.gram_CC, input_TC, input_TC)
        self.sum_C += sum_C
        self.tokens += len(input_TC) if tokens is None else tokens

    @property
    def empty(self) -> bool:
        """Whether every input so far was zero: of an expert that no token has been sent to."""
        if self.gram_CC is None or self._factor is not None:
            return not bool(self.square_C.any())
        return not bool(self.gram_CC.diagonal().any())

    @property
    def mean_square_C(self) -> torch.Tensor:
        """E[x^2] of each column, float64 where the device has it."""
        if self.gram_CC is None or self._factor is not None:
            return self.square_C / self.tokens
        return self.gram_CC.diagonal().to(self._dtype) / self.tokens

    @property
    def mean_C(self) -> torch.Tensor:
        """E[x] of each column, likewise."""
        return self.sum_C / self.tokens

    @property
    def variance_C(self) -> torch.Tensor:
        """Var[x] of each column, likewise."""
        return (self.mean_square_C - self.mean_C.square()).clamp_min(0)

    def factor(self, damping: float, *, where: str) -> DampedFactor:
        """The factor of ``x x^T``, which takes the Gram matrix's memory: nothing is added any more.

        Args:
            damping: share of the mean diagonal that is added to the diagonal.
            where: name for error texts.
        """
        assert self.gram_CC is not None
        if self._factor is None:
            self.square_C.copy_(self.gram_CC.diagonal())
            self._factor = DampedFactor(self.gram_CC, damping, where=where)
        elif self._factor.asked != damping:
            self._factor.restore()
            self._factor = DampedFactor(self.gram_CC, damping, where=where)
        return self._factor


def column_norms(weight_HC: torch.Tensor, dtype: torch.dtype, *, order: int = 2) -> torch.Tensor:
    """Norm of each column, ``[C]``, computed in ``dtype`` without a copy of the weight in it."""
    norms = [
        torch.linalg.vector_norm(weight_HC[:, start : start + _COLUMNS], order, dim=0, dtype=dtype)
        for start in range(0, weight_HC.shape[1], _COLUMNS)
    ]
    return torch.cat(norms)


def exact_loss_U(
    factor: DampedFactor, weight_HC: torch.Tensor, columns_per_unit: int
) -> torch.Tensor:
    """What optimal compensation cannot give back when one unit goes: fp32 ``[U]``, summed over H.

    For a column ``||w_j||^2 / [G^-1]_jj``, for a block g of columns
    ``trace(W_g ([G^-1]_gg)^-1 W_g^T)`` (optimal brain surgeon: Hassibi and Stork 1993; layerwise:
    Frantar and Alistarh 2022).

    Args:
        factor: of G; used up.
        weight_HC: the projection's weight.
        columns_per_unit: columns that one unit owns.
    """
    if columns_per_unit == 1:
        return column_norms(weight_HC, torch.float32).square() / factor.inverse_diagonal()
    losses = []
    for unit, inverse_KK in enumerate(factor.inverse_blocks(columns_per_unit)):
        own = slice(unit * columns_per_unit, (unit + 1) * columns_per_unit)
        block_HK = weight_HC[:, own].float()
        solved_KH = torch.linalg.solve(inverse_KK, block_HK.T)
        losses.append((block_HK.T * solved_KH).sum())
    return torch.stack(losses)


def ridge_refit_(factor: DampedFactor, cross_HC: torch.Tensor, anchor_HC: torch.Tensor) -> float:
    """Write ``argmin ||T - X W'^T||^2 + lambda ||W' - W||^2`` over ``cross_HC``.

    Args:
        factor: of X^T X + lambda I.
        cross_HC: T^T X, fp32; becomes the refit weight.
        anchor_HC: W, the weight to stay close to, any floating dtype.

    Returns:
        How much of T's energy W' explains: ``2 <X W'^T, T> - ||X W'^T||^2``.
    """
    explained, rows = 0.0, refit_rows(cross_HC.device.type)
    for start in range(0, len(cross_HC), rows):
        cross_RC = cross_HC[start : start + rows]
        anchor_RC = anchor_HC[start : start + rows].float()
        # In terms of the change D = W' - W: D (G + lambda I) = T^T X - W G.
        change_RC = factor.solve(cross_RC - factor.times_gram(anchor_RC))
        refit_RC = anchor_RC + change_RC
        # W' G = T^T X - lambda D turns the energy that W' explains into two products.
        explained += float((refit_RC * cross_RC).sum())
        explained += factor.added * float((refit_RC * change_RC).sum())
        cross_RC.copy_(refit_RC)
    return explained
