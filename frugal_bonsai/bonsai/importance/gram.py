"""Second moments of the inputs of output projections, and the exact layerwise loss.

In: micro-batches of inputs. Out: means, variances and Gram matrices, and the loss that remains
after optimal compensation when a unit is removed.

Memory: one ``[C, C]`` fp32 matrix a group on the compute device (0.8 GB for Llama-3-8B's FFN).
factor.py factorises and inverts it in place.

Shape suffixes: C columns of an output projection, U units, H hidden, T tokens, M and N columns of
two factors, K columns of a unit, B windows of a micro-batch, S tokens of a window.
"""

from __future__ import annotations

import torch

from frugal_bonsai.accelerator import CUDA, sum_dtype
from frugal_bonsai.bonsai.importance.factor import DampedFactor

# Columns of a weight whose norms are computed together.
_COLUMNS = 128


def add_product_(sum_MN: torch.Tensor, left_TM: torch.Tensor, right_TN: torch.Tensor) -> None:
    """Add ``left^T right`` to an fp32 sum over tokens, in place.

    CUDA multiplies 16-bit factors directly and sums in fp32. This loses nothing, because a product
    of two 16-bit numbers is exact in fp32; converted factors would take ten times as long and twice
    the memory.

    Args:
        sum_MN: fp32 ``[M, N]``, contiguous.
        left_TM: ``[T, M]`` in the compute dtype.
        right_TN: ``[T, N]`` in the compute dtype.
    """
    half = left_TM.dtype == right_TN.dtype and left_TM.dtype.itemsize == 2
    if half and sum_MN.device.type == CUDA:
        torch.addmm(sum_MN, left_TM.T, right_TN, out_dtype=torch.float32, out=sum_MN)
    else:
        left_TM, right_TN = left_TM.float(), right_TN.float()
        sum_MN.addmm_(left_TM.T, right_TN)


class Moments:
    """Sums over tokens of one group's inputs x: x, x^2 and, where requested, x x^T.

    Attributes:
        tokens: number of tokens so far.
        sum_C: sum of x of each column.
        gram_CC: fp32 sum of x x^T; None where it was not requested.
    """

    def __init__(self, columns: int, *, device: torch.device, gram: bool) -> None:
        self.tokens = 0
        self._dtype = sum_dtype(device)
        self.sum_C = torch.zeros(columns, dtype=self._dtype, device=device)
        # Zero as long as the Gram matrix, whose diagonal is the same, is whole.
        self._own_square_C = torch.zeros(columns, dtype=self._dtype, device=device)
        self.gram_CC = torch.zeros(columns, columns, device=device) if gram else None
        self._factor: DampedFactor | None = None

    def add(self, input_BSC: torch.Tensor, *, tokens: int | None = None) -> None:
        """Add one micro-batch's inputs: all of them, or none when memory runs out.

        Args:
            input_BSC: the inputs, in the compute dtype.
            tokens: number of tokens, where tokens with zero inputs were left out; None counts the
                tokens of ``input_BSC``.
        """
        input_TC = input_BSC.flatten(0, 1)
        sum_C = input_TC.sum(0, dtype=torch.float32)
        if self.gram_CC is None:
            self._own_square_C += input_TC.float().square().sum(0)
        else:
            add_product_(self.gram_CC, input_TC, input_TC)
        self.sum_C += sum_C
        self.tokens += len(input_TC) if tokens is None else tokens

    @property
    def _square_C(self) -> torch.Tensor:
        """Sum of x^2 of each column."""
        if self.gram_CC is None or self._factor is not None:
            return self._own_square_C
        return self.gram_CC.diagonal().to(self._dtype)

    @property
    def empty(self) -> bool:
        """True where every input was zero: an expert that received no token."""
        return not bool(self._square_C.any())

    @property
    def mean_square_C(self) -> torch.Tensor:
        """E[x^2] of each column, float64 where the device has it."""
        return self._square_C / self.tokens

    @property
    def mean_C(self) -> torch.Tensor:
        """E[x] of each column, float64 where the device has it."""
        return self.sum_C / self.tokens

    @property
    def variance_C(self) -> torch.Tensor:
        """Var[x] of each column, float64 where the device has it."""
        return (self.mean_square_C - self.mean_C.square()).clamp_min(0)

    def factor(self, damping: float, *, where: str) -> DampedFactor:
        """Factorise ``x x^T`` in its own memory; add nothing afterwards.

        Args:
            damping: share of the mean diagonal that is added to the diagonal.
            where: name for error messages.

        Raises:
            CheckpointError: the inputs are not finite.
        """
        assert self.gram_CC is not None
        if self._factor is None:
            self._own_square_C.copy_(self.gram_CC.diagonal())
            self._factor = DampedFactor(self.gram_CC, damping, where=where)
        elif self._factor.damping != damping:
            self._factor.restore()
            self._factor = DampedFactor(self.gram_CC, damping, where=where)
        return self._factor


def column_norms(weight_HC: torch.Tensor, dtype: torch.dtype, *, order: int = 2) -> torch.Tensor:
    """Return the norm of each column, ``[C]``, in ``dtype`` without converting the whole weight."""
    norms = [
        torch.linalg.vector_norm(weight_HC[:, start : start + _COLUMNS], order, dim=0, dtype=dtype)
        for start in range(0, weight_HC.shape[1], _COLUMNS)
    ]
    return torch.cat(norms)


def exact_loss_U(
    factor: DampedFactor, weight_HC: torch.Tensor, columns_per_unit: int
) -> torch.Tensor:
    """Return the loss that optimal compensation leaves when one unit is removed.

    For a column j it is ``||w_j||^2 / [G^-1]_jj``; for a block g of columns it is
    ``trace(W_g ([G^-1]_gg)^-1 W_g^T)`` (optimal brain surgeon: Hassibi and Stork 1993; layerwise:
    Frantar and Alistarh 2022).

    Args:
        factor: of G, the Gram matrix of the projection's inputs; destroyed.
        weight_HC: the projection's weight.
        columns_per_unit: number of columns that one unit owns.

    Returns:
        fp32 ``[U]``, summed over tokens and outputs.
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
