"""The end of a student: final norm, output embedding (the head), and the loss.

In: the last layer's output for a micro-batch. Out: sums of the loss's terms, and the gradient of
the loss with respect to that output. The head is frozen. It is held dense in the compute dtype, as
stored, or as int8; the latter two are made dense in blocks of rows (stored_linear.py). Holds the
head and the logits of one block of tokens.

Shape suffixes: B windows of a micro-batch, S tokens of a window, H hidden channels, V vocabulary, T
tokens of a block, v rows of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from frugal_bonsai.adaptation.objective import (
    Sums,
    TopTokens,
    divergence,
    divergence_bounds,
    negative_log_likelihood,
)
from frugal_bonsai.adaptation.settings import Objective
from frugal_bonsai.adaptation.stored_linear import StoredLinear
from frugal_bonsai.adaptation.training_data import MicroBatch
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.dtypes import torch_dtype
from frugal_bonsai.int8 import quantise_rows
from frugal_bonsai.memory.work import DENSE_BLOCK_BYTES
from frugal_bonsai.stream.head import scale_and_cap_
from frugal_bonsai.stream.skeleton import Skeleton
from frugal_bonsai.stream.source import head_spans

DENSE, STORED, INT8 = "dense", "stored", "int8"


class _Block(NamedTuple):
    """Tokens whose logits are held together, with the tokens that follow them."""

    hidden_TH: torch.Tensor
    following_T: torch.Tensor
    teacher: TopTokens | None


class StudentHead:
    """Final norm and head of a student; :meth:`load` comes first.

    Args:
        checkpoint: the pruned model.
        skeleton: the same model's; gives the final norm, device and compute dtype.
        head_tokens: number of tokens whose logits are held at a time.
    """

    def __init__(self, checkpoint: Checkpoint, skeleton: Skeleton, *, head_tokens: int) -> None:
        self._checkpoint, self._spec, self._norm = checkpoint, skeleton.spec, skeleton.norm
        self._device, self._dtype = skeleton.device, skeleton.dtype
        self._head_tokens = head_tokens
        rows, columns = checkpoint.tensors[self._spec.head_tensor].shape
        self._linear = StoredLinear(columns, rows, dtype=self._dtype, bias_O=None)

    def load(self, form: str) -> None:
        """Read the head in blocks of rows.

        Args:
            form: ``DENSE`` (in the compute dtype), ``STORED`` (as in the file) or ``INT8``.
        """
        name = self._spec.head_tensor
        entry = self._checkpoint.tensors[name]
        rows, columns = entry.shape
        dtype = {DENSE: self._dtype, STORED: torch_dtype(entry.dtype), INT8: torch.int8}[form]
        head_VH = torch.empty(rows, columns, dtype=dtype, device=self._device)
        scales_V = torch.empty(rows, device=self._device) if form == INT8 else None
        for start, stop in head_spans(self._spec, max(1, DENSE_BLOCK_BYTES // (4 * columns))):
            rows_vH = self._checkpoint.read_rows(name, start, stop).to(self._device)
            if scales_V is None:
                head_VH[start:stop] = rows_vH
            else:
                head_VH[start:stop], scales_V[start:stop] = quantise_rows(rows_vH)
        self._linear.load(head_VH, scales_V)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits ``[..., V]`` for the last layer's output ``[..., H]``."""
        return scale_and_cap_(self._linear(self._norm(hidden)).float(), self._spec)

    def gradient(
        self, batch: MicroBatch, hidden_BSH: torch.Tensor, objective: Objective, scale: float
    ) -> tuple[torch.Tensor | None, Sums]:
        """Return the gradient of ``scale`` times the loss at the last layer's output, and the sums.

        Args:
            batch: the micro-batch.
            hidden_BSH: the last layer's output.
            objective: the loss; its term of hidden states is the student's to add.
            scale: factor of the loss, which is summed over tokens.
        """
        hidden_BSH = hidden_BSH.detach().requires_grad_()
        total = Sums()
        for block in self._blocks(batch, hidden_BSH):
            loss, sums = self._block_loss(block, objective)
            (loss * scale).backward()
            total.add(sums)
        return hidden_BSH.grad, total

    def sums(self, batch: MicroBatch, hidden_BSH: torch.Tensor, objective: Objective) -> Sums:
        """Return the sums, with the upper bound of the divergence."""
        total = Sums()
        for block in self._blocks(batch, hidden_BSH):
            total.add(self._block_loss(block, objective, bounds=True)[1])
        return total

    def _blocks(self, batch: MicroBatch, hidden_BSH: torch.Tensor) -> Iterator[_Block]:
        """Yield blocks of each window's tokens but the last, which nothing follows."""
        for window, tokens_S in enumerate(batch.tokens_BS):
            predicted = len(tokens_S) - 1
            for start in range(0, predicted, self._head_tokens):
                here = slice(start, min(start + self._head_tokens, predicted))
                following_T = tokens_S[here.start + 1 : here.stop + 1].to(self._device)
                teacher = None
                if batch.targets is not None:
                    teacher = batch.targets.top_of(window, here, self._device)
                yield _Block(hidden_BSH[window, here], following_T, teacher)

    def _block_loss(
        self, block: _Block, objective: Objective, *, bounds: bool = False
    ) -> tuple[torch.Tensor, Sums]:
        """Return a block's loss and sums; with ``bounds`` both bounds of the divergence."""
        logits_TV = self.logits(block.hidden_TH)
        nll = negative_log_likelihood(logits_TV, block.following_T)
        sums = Sums(tokens=len(block.following_T), lm=float(nll.detach()))
        loss = objective.lm * nll
        if block.teacher is not None:
            temperature = objective.temperature
            if bounds:
                kl, upper = divergence_bounds(logits_TV, block.teacher, temperature)
                sums.kl_upper = float(upper)
            else:
                kl = divergence(logits_TV, block.teacher, temperature)
            sums.kl = float(kl.detach())
            loss = loss + objective.kl * temperature**2 * kl
        return loss, sums
