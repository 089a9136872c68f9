"""Sums over chunks of the vocabulary: losses, greedy matches, most likely tokens.

In: logits of a block of tokens for a chunk of the head's rows. Out: the tensors that the caller
gave are brought up to date in place. Holds a few values per token.

Shape suffixes: v rows of a chunk, T tokens of a block, K most likely tokens.
"""

from __future__ import annotations

import torch


class RunningLosses:
    """Running sums of the loss over chunks of the vocabulary; its tensors change in place.

    Args:
        following_T: next tokens, numbered from the chunk's first row.
        target_T: logits of the next tokens; 0 before their chunk.
        spread_T: log-sum-exp of the logits so far.
    """

    def __init__(
        self, following_T: torch.Tensor, target_T: torch.Tensor, spread_T: torch.Tensor
    ) -> None:
        self._following_T, self._target_T, self._spread_T = following_T, target_T, spread_T

    def add(self, block: slice, logits_Tv: torch.Tensor) -> None:
        """Add a chunk's logits for a block of tokens; overwrites the logits."""
        logits_Tv = logits_Tv.float()
        target_T = _target_logits(logits_Tv, self._following_T[block])
        spread_T = torch.logaddexp(self._spread_T[block], _log_sum_exp_(logits_Tv))
        # Changed last: if memory runs out above, these tokens are computed again.
        self._target_T[block] += target_T
        self._spread_T[block] = spread_T


class RunningScores(RunningLosses):
    """The losses, and whether each next token is the most likely one.

    Args:
        following_T: next tokens, numbered from the chunk's first row.
        target_T: logits of the next tokens; 0 before their chunk.
        spread_T: log-sum-exp of the logits so far.
        best_T: largest logit so far.
        greedy_T: whether the largest logit so far is that of the next token.
    """

    def __init__(
        self,
        following_T: torch.Tensor,
        target_T: torch.Tensor,
        spread_T: torch.Tensor,
        best_T: torch.Tensor,
        greedy_T: torch.Tensor,
    ) -> None:
        super().__init__(following_T, target_T, spread_T)
        self._best_T, self._greedy_T = best_T, greedy_T

    def add(self, block: slice, logits_Tv: torch.Tensor) -> None:
        """Add a chunk's logits for a block of tokens; overwrites the logits."""
        best_T, at_T = logits_Tv.float().max(-1)
        # Of equal logits in several chunks the first one counts, as with argmax.
        larger_T = best_T > self._best_T[block]
        greedy_T = torch.where(larger_T, at_T == self._following_T[block], self._greedy_T[block])
        best_T = torch.maximum(best_T, self._best_T[block])
        super().add(block, logits_Tv)
        self._best_T[block], self._greedy_T[block] = best_T, greedy_T


class RunningTop:
    """The most likely next tokens over chunks of the vocabulary; its tensors change in place.

    Args:
        values_TK: their logits divided by the temperature, in descending order.
        ids_TK: their numbers.
        spread_T: log-sum-exp of all logits so far.
        first: first row of the chunk.
        temperature: logits are divided by it.
    """

    def __init__(
        self,
        values_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        spread_T: torch.Tensor,
        first: int,
        temperature: float,
    ) -> None:
        self._values_TK, self._ids_TK, self._spread_T = values_TK, ids_TK, spread_T
        self._first, self._temperature = first, temperature

    def add(self, block: slice, logits_Tv: torch.Tensor) -> None:
        """Add a chunk's logits for a block of tokens; overwrites the logits."""
        logits_Tv = logits_Tv.float()
        if self._temperature != 1.0:
            logits_Tv.div_(self._temperature)
        count = self._values_TK.shape[1]
        here_TK, at_TK = logits_Tv.topk(min(count, logits_Tv.shape[1]), dim=-1)
        both_T = torch.cat([self._values_TK[block], here_TK], dim=-1)
        ids_T = torch.cat([self._ids_TK[block], (at_TK + self._first).to(torch.int32)], dim=-1)
        values_TK, chosen_TK = both_T.topk(count, dim=-1)
        ids_TK = ids_T.gather(-1, chosen_TK)
        spread_T = torch.logaddexp(self._spread_T[block], _log_sum_exp_(logits_Tv))
        # Changed last: if memory runs out above, these tokens are computed again.
        self._values_TK[block], self._ids_TK[block] = values_TK, ids_TK
        self._spread_T[block] = spread_T


def _target_logits(logits_Tv: torch.Tensor, following_T: torch.Tensor) -> torch.Tensor:
    """Return the logit of each next token, and 0 if it is not in this chunk."""
    inside_T = (following_T >= 0) & (following_T < logits_Tv.shape[1])
    at_T = following_T.clamp(0, logits_Tv.shape[1] - 1)
    found_T = logits_Tv.gather(-1, at_T[:, None])[:, 0]
    return torch.where(inside_T, found_T, torch.zeros_like(found_T))


def _log_sum_exp_(logits_Tv: torch.Tensor) -> torch.Tensor:
    """Return the log-sum-exp over the vocabulary; overwrites the logits instead of copying them."""
    largest_T1 = logits_Tv.amax(-1, keepdim=True)
    sum_T = logits_Tv.sub_(largest_T1).exp_().sum(-1)
    return sum_T.log_().add_(largest_T1[:, 0])
