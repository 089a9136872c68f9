"""The training loss: language modelling, the teacher's next-token distribution, hidden states.

In: logits or hidden states of the student, and the teacher's answers for the same tokens. Out: sums
over tokens, in nats. The teacher's distribution is stored as its K most likely next tokens and the
probability mass of all other tokens. The Kullback-Leibler divergence KL(teacher || student) is
therefore known only between two bounds:

- The lower bound treats all other tokens as one token (data processing inequality; Cover and
  Thomas, Elements of Information Theory, section 2.8). The student is trained on it.
- The upper bound gives all other tokens the teacher's probability of its K-th token, and the
  student's smallest probability.

Holds no tensors.

Shape suffixes: T tokens, V vocabulary, K most likely tokens, B windows, S tokens of a window, H
hidden channels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from frugal_bonsai.adaptation.settings import Objective

# Smallest mass of the student's other tokens. fp32 probabilities sum to one with an error of this
# size, so a smaller mass is rounding and gets no gradient.
_LEAST_MASS = 1e-6


@dataclass
class Sums:
    """Sums over tokens, in nats (``hidden``: relative squared error).

    Attributes:
        tokens: number of predicted tokens.
        lm: negative log-likelihood.
        kl: lower bound of the divergence from the teacher.
        kl_upper: upper bound of the divergence; 0 in training steps.
        hidden: error of the hidden states, summed over layers.
    """

    tokens: int = 0
    lm: float = 0.0
    kl: float = 0.0
    kl_upper: float = 0.0
    hidden: float = 0.0

    def add(self, other: Sums) -> None:
        """Add the sums of other tokens."""
        for field in fields(Sums):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def loss(self, objective: Objective) -> float:
        """Return the mean loss of a token."""
        kl = objective.kl * objective.temperature**2 * self.kl
        return (objective.lm * self.lm + kl + objective.hidden * self.hidden) / max(self.tokens, 1)


@dataclass(frozen=True)
class TopTokens:
    """The teacher's next-token distribution, truncated to the most likely tokens.

    Attributes:
        values_TK: log-probabilities, fp32.
        ids_TK: token numbers, int64.
        rest_T: probability mass of all other tokens, fp32.
    """

    values_TK: torch.Tensor
    ids_TK: torch.Tensor
    rest_T: torch.Tensor

    def probabilities(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return probabilities of the kept tokens and of the rest, normalised after fp16."""
        kept_TK = self.values_TK.exp()
        total_T = kept_TK.sum(-1) + self.rest_T
        return kept_TK / total_T[:, None], self.rest_T / total_T


def negative_log_likelihood(logits_TV: torch.Tensor, following_T: torch.Tensor) -> torch.Tensor:
    """Return the sum over tokens, in nats, for fp32 logits."""
    return torch.nn.functional.cross_entropy(logits_TV, following_T, reduction="sum")


def divergence(
    logits_TV: torch.Tensor, teacher: TopTokens, temperature: float = 1.0
) -> torch.Tensor:
    """Return the lower bound of KL(teacher || student), summed over tokens, in nats."""
    student_TK, _ = _student(logits_TV, teacher, temperature)
    return _lower_bound(student_TK, teacher).sum()


def divergence_bounds(
    logits_TV: torch.Tensor, teacher: TopTokens, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both bounds of KL(teacher || student), summed over tokens, in nats.

    Args:
        logits_TV: the student's, fp32.
        teacher: its distribution at this temperature.
        temperature: the student's logits are divided by it.
    """
    student_TK, spread_T = _student(logits_TV, teacher, temperature)
    lower_T = _lower_bound(student_TK, teacher)
    kept_TK, rest_T = teacher.probabilities()
    as_one_T = _term(rest_T, _rest_log(student_TK))
    others_TV = (logits_TV / temperature).scatter(-1, teacher.ids_TK, torch.inf)
    least_T = others_TV.amin(-1) - spread_T
    if teacher.ids_TK.shape[1] == logits_TV.shape[1]:  # no other tokens: the minimum is infinite
        least_T = torch.zeros_like(least_T)
    apart_T = rest_T * (kept_TK.amin(-1).clamp_min(1e-30).log() - least_T)
    return lower_T.sum(), (lower_T - as_one_T + torch.maximum(apart_T, as_one_T)).sum()


def hidden_error(
    hidden_BSH: torch.Tensor, teacher_BSH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum over tokens of |student - teacher|^2 / |teacher|^2, and its gradient.

    Args:
        hidden_BSH: the student's hidden states.
        teacher_BSH: the teacher's, fp32.

    Returns:
        The sum, and the gradient fp32 ``[B, S, H]`` with respect to the student's hidden states.
    """
    difference_BSH = hidden_BSH.float() - teacher_BSH
    scale_BS1 = teacher_BSH.square().sum(-1, keepdim=True).clamp_min_(1e-12)
    total = (difference_BSH.square().sum(-1, keepdim=True) / scale_BS1).sum()
    return total, difference_BSH.mul_(2.0).div_(scale_BS1)


def _student(
    logits_TV: torch.Tensor, teacher: TopTokens, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the student's log-probabilities of the teacher's tokens, and its log-sum-exp."""
    if temperature != 1.0:
        logits_TV = logits_TV / temperature
    spread_T = logits_TV.logsumexp(-1)
    return logits_TV.gather(-1, teacher.ids_TK) - spread_T[:, None], spread_T


def _rest_log(student_TK: torch.Tensor) -> torch.Tensor:
    """Return the log of the student's mass outside the teacher's tokens."""
    return (1.0 - student_TK.exp().sum(-1)).clamp_min(_LEAST_MASS).log()


def _term(mass: torch.Tensor, student_log: torch.Tensor) -> torch.Tensor:
    """Return p (log p - log q), and 0 where p is 0."""
    entropy: torch.Tensor = torch.special.xlogy(mass, mass)
    return entropy - mass * student_log


def _lower_bound(student_TK: torch.Tensor, teacher: TopTokens) -> torch.Tensor:
    """Return the lower bound of each token's divergence."""
    kept_TK, rest_T = teacher.probabilities()
    return _term(kept_TK, student_TK).sum(-1) + _term(rest_T, _rest_log(student_TK))
