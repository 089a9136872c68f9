"""The Cholesky factor of a damped Gram matrix, in the matrix's own memory.

In: a symmetric fp32 matrix. Out: solves with it, products with what it was, blocks of its inverse.
Holds one block column beside the matrix: LAPACK's and torch's own routines would hold the matrix,
its damped copy, its factor and its inverse, four times 0.8 GB for Llama-3-8B's FFN.

The lower triangle holds the factor; the blocks above the diagonal stay as they were, those on it
are kept aside. So the matrix can still be multiplied with, and be factorised again with more
damping. (Right-looking blocked Cholesky and blocked triangular inverse: LAPACK's POTRF and TRTRI.)

Shape suffixes: C columns, K those of a block, R right-hand sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.linalg import solve_triangular

from frugal_bonsai.errors import CheckpointError

BLOCK = 256
_LARGEST_DAMPING = 1.0


class DampedFactor:
    """Factor of ``gram + damping * mean(diagonal) * I``.

    A matrix that is not positive definite in fp32 gets ten times the damping, until it is.

    Attributes:
        asked: the damping that was asked for, as a share of the mean diagonal.
        added: what has been added to the diagonal.

    Args:
        gram_CC: contiguous fp32; its memory is the factor's from now on.
        damping: share of the mean diagonal.
        where: name for error texts.

    Raises:
        CheckpointError: the matrix is not finite, so the model's activations are not.
    """

    def __init__(self, gram_CC: torch.Tensor, damping: float, *, where: str) -> None:
        self._matrix_CC, self.asked, self._inverted = gram_CC, damping, False
        columns = len(gram_CC)
        self._blocks = [
            slice(start, min(start + BLOCK, columns)) for start in range(0, columns, BLOCK)
        ]
        scale = gram_CC.diagonal().mean().clamp_min(torch.finfo(gram_CC.dtype).tiny)
        if not bool(torch.isfinite(scale)):
            raise CheckpointError(
                f"{where}: activations are not finite; the model overflows on this text in this "
                f"precision, try --weights native or another calibration text"
            )
        self._diagonal = [gram_CC[here, here].clone() for here in self._blocks]
        while damping <= _LARGEST_DAMPING:
            self.added = float(damping * scale)
            if self._factorise():
                return
            self.restore()
            damping *= 10
        raise CheckpointError(f"{where}: the Gram matrix of its inputs is not positive definite")

    def _factorise(self) -> bool:
        matrix_CC = self._matrix_CC
        matrix_CC.diagonal().add_(self.added)
        for at, here in enumerate(self._blocks):
            factor = torch.linalg.cholesky_ex(matrix_CC[here, here])
            if int(factor.info) != 0:
                return False
            matrix_CC[here, here] = factor.L
            panel = matrix_CC[here.stop :, here]
            panel.copy_(solve_triangular(factor.L.mT, panel, upper=True, left=False))
            for block in self._blocks[at + 1 :]:
                rows, own = panel[block.start - here.stop :], matrix_CC[block, here]
                matrix_CC[block.start :, block].addmm_(rows, own.T, alpha=-1)
        return True

    def restore(self) -> None:
        """Make the matrix what it was."""
        for here, block_KK in zip(self._blocks, self._diagonal, strict=True):
            self._matrix_CC[here, here] = block_KK
            self._matrix_CC[here.stop :, here] = self._matrix_CC[here, here.stop :].T

    def times_gram(self, left_RC: torch.Tensor) -> torch.Tensor:
        """``left @ gram``, the damping not in it."""
        product_RC = torch.zeros_like(left_RC)
        for here, block_KK in zip(self._blocks, self._diagonal, strict=True):
            right = self._matrix_CC[here, here.stop :]
            product_RC[:, here].addmm_(left_RC[:, here], block_KK)
            product_RC[:, here].addmm_(left_RC[:, here.stop :], right.T)
            product_RC[:, here.stop :].addmm_(left_RC[:, here], right)
        return product_RC

    def solve(self, right_RC: torch.Tensor) -> torch.Tensor:
        """``right @ (gram + added * I)^-1``."""
        return self.times_inverse(self.times_inverse_transposed(right_RC))

    def times_inverse(self, right_RC: torch.Tensor) -> torch.Tensor:
        """``right @ L^-1`` of the factor ``L``; leading dimensions are free."""
        out_RC: torch.Tensor = solve_triangular(self._matrix_CC, right_RC, upper=False, left=False)
        return out_RC

    def times_inverse_transposed(self, right_RC: torch.Tensor) -> torch.Tensor:
        """``right @ L^-T``: inputs become white, were they the rows of ``right``."""
        matrix_CC = self._matrix_CC.mT
        out_RC: torch.Tensor = solve_triangular(matrix_CC, right_RC, upper=True, left=False)
        return out_RC

    def inverse_diagonal(self) -> torch.Tensor:
        """Diagonal of the inverse, ``[C]``; the factor is used up."""
        self._invert()
        norms = [
            torch.linalg.vector_norm(self._matrix_CC[here.start :, here], dim=0)
            for here in self._blocks
        ]
        return torch.cat(norms).square()

    def inverse_blocks(self, width: int) -> Iterator[torch.Tensor]:
        """Blocks ``[K, K]`` of this width on the inverse's diagonal; the factor is used up."""
        self._invert()
        for start in range(0, len(self._matrix_CC), width):
            columns = self._matrix_CC[start:, start : start + width]
            yield columns.T @ columns

    def guess(self, pool_P: torch.Tensor) -> torch.Tensor:
        """The best linear guess of some columns from the others: fp16 ``[P, C-P]`` on the CPU.

        With M the inverse it is ``-(M_pp)^-1 M_pc``, so that no part of the Gram matrix need be
        taken out of it and factorised. The factor is used up.

        Args:
            pool_P: int64, the columns that are guessed; the others stay in their order.
        """
        self._invert()
        matrix_CC, columns = self._matrix_CC, len(self._matrix_CC)
        core_C = torch.ones(columns, dtype=torch.bool, device=matrix_CC.device)
        core_C[pool_P] = False
        core = core_C.nonzero().flatten()
        pool = torch.split(pool_P, BLOCK)
        inner_PP = torch.cat([self._products(pool, block) for block in pool], dim=1)
        pool_factor_PP = torch.linalg.cholesky(inner_PP)
        del inner_PP
        guess_PK = torch.empty(len(pool_P), len(core), dtype=torch.float16)
        for start in range(0, len(core), BLOCK):
            some = slice(start, start + BLOCK)
            across_PB = self._products(pool, core[some])
            guess_PK[:, some] = torch.cholesky_solve(across_PB, pool_factor_PP).neg_().half()
        return guess_PK

    def _products(self, rows: Sequence[torch.Tensor], columns: torch.Tensor) -> torch.Tensor:
        """Some rows and columns of the inverse, a block of rows at a time."""
        matrix_CC = self._matrix_CC
        right_CB = matrix_CC[:, columns]
        out = right_CB.new_empty(sum(map(len, rows)), len(columns))
        for block, out_RB in zip(rows, torch.split(out, BLOCK), strict=True):
            torch.mm(matrix_CC[:, block].T, right_CB, out=out_RB)
        return out

    def _invert(self) -> None:
        """Replace the factor by its inverse M, lower triangular: ``M^T M`` is what is wanted."""
        if self._inverted:
            return
        self._inverted = True
        matrix_CC = self._matrix_CC
        for at in reversed(range(len(self._blocks))):
            here = self._blocks[at]
            block_KK = matrix_CC[here, here].contiguous()
            one_KK = torch.eye(len(block_KK), dtype=block_KK.dtype, device=block_KK.device)
            inverse_KK = solve_triangular(block_KK, one_KK, upper=False)
            product = matrix_CC[here.stop :, here] @ inverse_KK
            for rows in self._blocks[at + 1 :]:
                done = matrix_CC[rows, here.stop : rows.stop]
                matrix_CC[rows, here] = done @ product[: rows.stop - here.stop]
            matrix_CC[here.stop :, here].neg_()
            matrix_CC[here, here] = inverse_KK
            matrix_CC[here, here.stop :] = 0
        self._diagonal = []
