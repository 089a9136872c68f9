"""Cholesky factor of a damped Gram matrix, computed in the matrix's own memory.

In: a symmetric fp32 matrix. Out: solves with it, products with the original matrix, blocks of its
inverse, and the regression of some columns on the others.

Memory: one block column beside the matrix. LAPACK's and torch's own routines would hold the matrix,
its damped copy, its factor and its inverse: four times 0.8 GB for Llama-3-8B's FFN.

The lower triangle holds the factor. The blocks above the diagonal keep the original matrix, and the
blocks on the diagonal are copied. So the original can still be multiplied with, and restored to be
factorised again with more damping. The algorithms are the right-looking blocked Cholesky
factorisation and the blocked triangular inverse, LAPACK's POTRF and TRTRI.

Shape suffixes: C columns, K columns of a block, B columns of another block, R right-hand sides, P
columns of the pool.
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
        damping: requested damping, as a share of the mean diagonal.
        added: value that was added to the diagonal.

    Args:
        gram_CC: contiguous fp32; the factor takes over its memory.
        damping: share of the mean diagonal.
        where: name for error messages.

    Raises:
        CheckpointError: the matrix is not finite, because the model's activations are not.
    """

    def __init__(self, gram_CC: torch.Tensor, damping: float, *, where: str) -> None:
        self._matrix_CC, self.damping, self._inverted = gram_CC, damping, False
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
        raise CheckpointError(
            f"{where}: the Gram matrix of its inputs is not positive definite even with a damping "
            f"of {_LARGEST_DAMPING:g} times its mean diagonal; try another calibration text"
        )

    def _factorise(self) -> bool:
        """Factorise in place; return False where the matrix is not positive definite."""
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
        """Restore the original matrix to the bit."""
        for here, block_KK in zip(self._blocks, self._diagonal, strict=True):
            self._matrix_CC[here, here] = block_KK
            self._matrix_CC[here.stop :, here] = self._matrix_CC[here, here.stop :].T

    def times_gram(self, left_RC: torch.Tensor) -> torch.Tensor:
        """Return ``left @ gram``, without the damping."""
        product_RC = torch.zeros_like(left_RC)
        for here, block_KK in zip(self._blocks, self._diagonal, strict=True):
            right = self._matrix_CC[here, here.stop :]
            product_RC[:, here].addmm_(left_RC[:, here], block_KK)
            product_RC[:, here].addmm_(left_RC[:, here.stop :], right.T)
            product_RC[:, here.stop :].addmm_(left_RC[:, here], right)
        return product_RC

    def solve(self, right_RC: torch.Tensor) -> torch.Tensor:
        """Return ``right @ (gram + added * I)^-1``."""
        return self.times_inverse(self.times_inverse_transposed(right_RC))

    def times_inverse(self, right_RC: torch.Tensor) -> torch.Tensor:
        """Return ``right @ L^-1`` with the factor L; ``right`` may have leading dimensions."""
        out_RC: torch.Tensor = solve_triangular(self._matrix_CC, right_RC, upper=False, left=False)
        return out_RC

    def times_inverse_transposed(self, right_RC: torch.Tensor) -> torch.Tensor:
        """Return ``right @ L^-T``, which whitens inputs in the rows of ``right``."""
        matrix_CC = self._matrix_CC.mT
        out_RC: torch.Tensor = solve_triangular(matrix_CC, right_RC, upper=True, left=False)
        return out_RC

    def inverse_diagonal(self) -> torch.Tensor:
        """Return the diagonal of the inverse, ``[C]``; this destroys the factor."""
        self._invert()
        norms = [
            torch.linalg.vector_norm(self._matrix_CC[here.start :, here], dim=0)
            for here in self._blocks
        ]
        return torch.cat(norms).square()

    def inverse_blocks(self, width: int) -> Iterator[torch.Tensor]:
        """Yield the inverse's diagonal blocks ``[width, width]``; this destroys the factor."""
        self._invert()
        for start in range(0, len(self._matrix_CC), width):
            columns = self._matrix_CC[start:, start : start + width]
            yield columns.T @ columns

    def regression(self, pool_P: torch.Tensor) -> torch.Tensor:
        """Return the best linear prediction of the pool's columns from the other columns.

        With M the inverse of the damped Gram matrix it is ``-(M_pp)^-1 M_pc``, with p the pool and
        c the other columns. This destroys the factor.

        Args:
            pool_P: int64, the predicted columns.

        Returns:
            fp16 ``[P, C-P]`` on the CPU, the other columns in ascending order.
        """
        self._invert()
        matrix_CC, columns = self._matrix_CC, len(self._matrix_CC)
        core_C = torch.ones(columns, dtype=torch.bool, device=matrix_CC.device)
        core_C[pool_P] = False
        core = core_C.nonzero().flatten()
        pool = torch.split(pool_P, BLOCK)
        inner_PP = torch.cat([self._inverse_at(pool, block) for block in pool], dim=1)
        pool_factor_PP = torch.linalg.cholesky(inner_PP)
        del inner_PP
        weight_PK = torch.empty(len(pool_P), len(core), dtype=torch.float16)
        for start in range(0, len(core), BLOCK):
            some = slice(start, start + BLOCK)
            across_PB = self._inverse_at(pool, core[some])
            weight_PK[:, some] = torch.cholesky_solve(across_PB, pool_factor_PP).neg_().half()
        return weight_PK

    def _inverse_at(self, rows: Sequence[torch.Tensor], columns: torch.Tensor) -> torch.Tensor:
        """Return some rows and columns of the inverse, computed a block of rows at a time."""
        matrix_CC = self._matrix_CC
        right_CB = matrix_CC[:, columns]
        out = right_CB.new_empty(sum(map(len, rows)), len(columns))
        for block, out_RB in zip(rows, torch.split(out, BLOCK), strict=True):
            torch.mm(matrix_CC[:, block].T, right_CB, out=out_RB)
        return out

    def _invert(self) -> None:
        """Replace the factor by its inverse N, lower triangular; the inverse is ``N^T N``."""
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
