"""The head as a phase of its own: final norm, logits, loss, in chunks of tokens and of vocabulary.

In: the last layer's hidden states. Out: the negative log-likelihood of every token but the first,
or logits. Head weights are read from disk in row chunks, so that neither V * H weights nor
tokens * V logits are ever held whole unless they fit.

Shape suffixes: B windows, S tokens, H hidden, V vocabulary (v a chunk of it), T = B * (S - 1).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.skeleton import Skeleton


class Head:
    """Final norm and output embedding of a model.

    Args:
        checkpoint: where the head's rows are read.
        skeleton: gives the final norm, device and dtype.
        rows: vocabulary rows held at a time.
        tokens: tokens whose logits are held at a time (at least one window's).
    """

    def __init__(
        self, checkpoint: Checkpoint, skeleton: Skeleton, *, rows: int, tokens: int
    ) -> None:
        self._checkpoint, self._skeleton = checkpoint, skeleton
        self._rows = min(rows, skeleton.spec.vocabulary)
        self._tokens = tokens
        self._kept: torch.Tensor | None = None

    def nll(self, hidden: HiddenStates, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood in nats of tokens 2..S of each window, fp32 ``[B, S-1]``, CPU."""
        windows, window = tokens_BS.shape
        device = self._skeleton.device
        spread_BS = torch.full((windows, window - 1), -torch.inf, device=device)
        target_BS = torch.zeros(windows, window - 1, device=device)
        following_BS = tokens_BS[:, 1:].to(device)
        step = max(1, self._tokens // window)
        for first, weight_vH in self._chunks():
            stop = first + len(weight_vH)
            for start in range(0, windows, step):
                here = slice(start, min(start + step, windows))
                logits_BSv = self._logits(hidden.read(here)[:, :-1], weight_vH).float()
                next_BS = following_BS[here]
                inside_BS = (next_BS >= first) & (next_BS < stop)
                at_BS = (next_BS - first).clamp(0, stop - first - 1)
                found_BS = logits_BSv.gather(-1, at_BS[..., None])[..., 0]
                target_BS[here] += torch.where(inside_BS, found_BS, torch.zeros_like(found_BS))
                spread_BS[here] = torch.logaddexp(spread_BS[here], logits_BSv.logsumexp(-1))
        return (spread_BS - target_BS).cpu()

    def logits(self, hidden_BSH: torch.Tensor) -> torch.Tensor:
        """Logits of all tokens over the whole vocabulary, fp32 ``[B, S, V]``."""
        parts = [self._logits(hidden_BSH, weight_vH).float() for _, weight_vH in self._chunks()]
        return torch.cat(parts, dim=-1)

    def _logits(self, hidden_BSH: torch.Tensor, weight_vH: torch.Tensor) -> torch.Tensor:
        normed_BSH = self._skeleton.norm(hidden_BSH)
        return torch.nn.functional.linear(normed_BSH, weight_vH)

    def _chunks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield ``(first row, rows [v, H])``; a head that fits in one chunk is read once."""
        vocabulary = self._skeleton.spec.vocabulary
        if self._rows >= vocabulary:
            if self._kept is None:
                self._kept = self._read(0, vocabulary)
            yield 0, self._kept
            return
        for first in range(0, vocabulary, self._rows):
            yield first, self._read(first, min(first + self._rows, vocabulary))

    def _read(self, first: int, stop: int) -> torch.Tensor:
        skeleton = self._skeleton
        rows_vH = self._checkpoint.read_rows(skeleton.spec.head_tensor, first, stop)
        return rows_vH.to(skeleton.device, skeleton.dtype)
