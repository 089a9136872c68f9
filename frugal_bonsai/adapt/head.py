"""The student's end: final norm, head, the loss of some tokens at a time.

In: the last layer's output of a micro-batch. Out: sums of the loss's terms, and with gradients
those of that output. The head is frozen: dense in the compute dtype, or as stored or as int8, of
which frozen.py makes some rows dense at a time. Holds the head and a block of tokens' logits.

Shape suffixes: B windows of a micro-batch, S tokens, H hidden, V vocabulary, T tokens of a block,
v rows of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from frugal_bonsai.adapt.frozen import FrozenLinear
from frugal_bonsai.adapt.objective import (
    Followers,
    Objective,
    divergence,
    divergence_bounds,
    negative_log_likelihood,
)
from frugal_bonsai.adapt.part import Part, Sums
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.dtypes import torch_dtype
from frugal_bonsai.int8 import quantise_rows
from frugal_bonsai.memory.work import DENSE_BLOCK_BYTES
from frugal_bonsai.model.family import ModelSpec

DENSE, STORED, INT8 = "dense", "stored", "int8"


class StudentHead:
    """Final norm and head of a student; :meth:`load` comes first.

    Args:
        checkpoint: the pruned model.
        spec: its description.
        norm: the final norm, in place.
        device: where it is computed.
        dtype: compute dtype.
        head_tokens: tokens whose logits are held at a time.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        norm: nn.Module,
        *,
        device: torch.device,
        dtype: torch.dtype,
        head_tokens: int,
    ) -> None:
        self._checkpoint, self._spec, self._norm = checkpoint, spec, norm
        self._device, self._dtype, self._head_tokens = device, dtype, head_tokens
        rows, columns = checkpoint.tensors[spec.head_tensor].shape
        self._linear = FrozenLinear(columns, rows, dtype=dtype, bias_O=None)

    def load(self, how: str) -> None:
        """Read the head, some rows at a time.

        Args:
            how: ``DENSE`` in the compute dtype, ``STORED`` as in the file, or ``INT8``.
        """
        entry = self._checkpoint.tensors[self._spec.head_tensor]
        (rows, columns), stored = entry.shape, torch_dtype(entry.dtype)
        dtype = {DENSE: self._dtype, STORED: stored, INT8: torch.int8}[how]
        head_VH = torch.empty(rows, columns, dtype=dtype, device=self._device)
        scales_V = torch.empty(rows, device=self._device) if how == INT8 else None
        step = max(1, DENSE_BLOCK_BYTES // (4 * columns))
        for start in range(0, rows, step):
            here = slice(start, min(start + step, rows))
            rows_vH = self._checkpoint.read_rows(self._spec.head_tensor, here.start, here.stop)
            if scales_V is None:
                head_VH[here] = rows_vH.to(self._device)
            else:
                head_VH[here], scales_V[here] = quantise_rows(rows_vH.to(self._device))
        self._linear.load(head_VH, scales_V)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the last layer's output ``[..., H]``, as the model's own head scales and caps them.

        Returns:
            fp32 ``[..., V]``.
        """
        logits: torch.Tensor = self._linear(self._norm(hidden)).float()
        if self._spec.logits_divisor != 1.0:
            logits = logits / self._spec.logits_divisor
        if self._spec.logits_softcap is not None:
            logits = (logits / self._spec.logits_softcap).tanh() * self._spec.logits_softcap
        return logits

    def gradient(
        self, part: Part, hidden_BSH: torch.Tensor, objective: Objective, scale: float
    ) -> tuple[torch.Tensor | None, Sums]:
        """The gradient of ``scale`` times the loss at the last layer's output, and the sums."""
        hidden_BSH = hidden_BSH.detach().requires_grad_()
        total = Sums()
        for block in self._blocks(part, hidden_BSH):
            loss, sums = self._block_sums(block, objective)
            (loss * scale).backward()
            total.add(sums)
        return hidden_BSH.grad, total

    def sums(self, part: Part, hidden_BSH: torch.Tensor, objective: Objective) -> Sums:
        """The sums, the upper bound of the divergence too."""
        total = Sums()
        for block in self._blocks(part, hidden_BSH):
            total.add(self._block_sums(block, objective, bounds=True)[1])
        return total

    def _blocks(self, part: Part, hidden_BSH: torch.Tensor) -> Iterator[_Block]:
        """Tokens whose logits are held together: of one window, all but its last."""
        targets, step = part.targets, self._head_tokens
        for at, tokens_S in enumerate(part.tokens_BS):
            for start in range(0, len(tokens_S) - 1, step):
                here = slice(start, min(start + step, len(tokens_S) - 1))
                followers = None
                if targets is not None:
                    followers = Followers(
                        targets.values_BSK[at, here].to(self._device),
                        targets.ids_BSK[at, here].to(self._device),
                        targets.rest_BS[at, here].to(self._device),
                    )
                following_T = tokens_S[here.start + 1 : here.stop + 1].to(self._device)
                yield _Block(hidden_BSH[at, here], following_T, followers)

    def _block_sums(
        self, block: _Block, objective: Objective, *, bounds: bool = False
    ) -> tuple[torch.Tensor, Sums]:
        logits_TV = self.logits(block.hidden_TH)
        nll = negative_log_likelihood(logits_TV, block.following_T)
        sums = Sums(tokens=len(block.following_T), lm=float(nll.detach()))
        loss = objective.lm * nll
        if block.followers is not None:
            temperature = objective.temperature
            if bounds:
                kl, upper = divergence_bounds(logits_TV, block.followers, temperature)
                sums.kl_upper = float(upper)
            else:
                kl = divergence(logits_TV, block.followers, temperature)
            sums.kl = float(kl.detach())
            loss = loss + objective.kl * temperature**2 * kl
        return loss, sums


@dataclass(frozen=True)
class _Block:
    """Some tokens before the head."""

    hidden_TH: torch.Tensor
    following_T: torch.Tensor
    followers: Followers | None
