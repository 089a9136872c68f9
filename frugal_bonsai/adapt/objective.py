"""What a student is trained on: language modelling, the teacher's followers, its hidden states.

In: logits or hidden states of some tokens, what the teacher says of them. Out: sums over tokens, in
nats. The teacher's distribution is known as K followers and the mass of all others, so its
divergence from the student's (Kullback-Leibler) is known between two bounds: the one that counts
all others as one token is a lower bound (data processing inequality; Cover and Thomas, Elements of
Information Theory, section 2.8) and what is trained on; for the upper one all others are as likely
as the least likely kept one to the teacher, and as the least likely of all to the student.
Holds nothing.

Shape suffixes: T tokens, V vocabulary, K kept followers, B windows, S tokens of a window, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from frugal_bonsai.errors import OptionError

LM, KL, KL_HIDDEN = "lm", "kl", "kl+hidden"
LOSSES = (LM, KL, KL_HIDDEN)
# A student that gives all others less than this has no gradient from them: fp32 sums to one no
# more precisely.
_LEAST_MASS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Weights of the terms of the loss.

    Attributes:
        lm: of the negative log-likelihood of the text.
        kl: of the divergence from the teacher, times the temperature's square (Hinton et al. 2015,
            section 2), which keeps its gradients' size.
        hidden: of the relative squared error of the hidden states behind chosen layers.
        temperature: of the teacher's cache.
    """

    lm: float
    kl: float = 0.0
    hidden: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lm", "kl", "hidden"):
            if not 0.0 <= getattr(self, name) < 1e6:
                raise OptionError(f"--{name}-weight: {getattr(self, name)} is not 0 or more")
        if not self.lm + self.kl + self.hidden > 0.0:
            raise OptionError("the loss has no term: give one of its weights a positive number")

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss asks the teacher."""
        return self.kl > 0.0 or self.hidden > 0.0


def negative_log_likelihood(logits_TV: torch.Tensor, following_T: torch.Tensor) -> torch.Tensor:
    """Sum over tokens, in nats; logits fp32."""
    return torch.nn.functional.cross_entropy(logits_TV, following_T, reduction="sum")


@dataclass(frozen=True)
class Followers:
    """The teacher's distribution of what follows some tokens.

    Attributes:
        values_TK: log-probabilities.
        ids_TK: int64.
        rest_T: mass of all others.
    """

    values_TK: torch.Tensor
    ids_TK: torch.Tensor
    rest_T: torch.Tensor

    def probabilities(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the kept followers and of all others, which sum to one: fp16 has rounded them."""
        kept_TK = self.values_TK.exp()
        total_T = kept_TK.sum(-1) + self.rest_T
        return kept_TK / total_T[:, None], self.rest_T / total_T


def divergence(
    logits_TV: torch.Tensor, followers: Followers, temperature: float = 1.0
) -> torch.Tensor:
    """The lower bound of KL(teacher || student), summed over tokens, in nats; logits fp32."""
    student_TK, _ = _student(logits_TV, followers, temperature)
    return _lower_T(student_TK, followers).sum()


def divergence_bounds(
    logits_TV: torch.Tensor, followers: Followers, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper bound of KL(teacher || student), summed over tokens, in nats."""
    student_TK, spread_T = _student(logits_TV, followers, temperature)
    lower_T = _lower_T(student_TK, followers)
    others_TV = (logits_TV / temperature).scatter(-1, followers.ids_TK, torch.inf)
    least_T = others_TV.amin(-1) - spread_T
    kept_TK, rest_T = followers.probabilities()
    all_kept = followers.ids_TK.shape[1] == logits_TV.shape[1]
    least_T = torch.zeros_like(least_T) if all_kept else least_T
    one_T = _term(rest_T, _rest_log(student_TK))
    spread_out_T = rest_T * (kept_TK.amin(-1).clamp_min(1e-30).log() - least_T)
    return lower_T.sum(), (lower_T - one_T + torch.maximum(spread_out_T, one_T)).sum()


def hidden_error(
    hidden_BSH: torch.Tensor, teacher_BSH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over tokens of |student - teacher|^2 / |teacher|^2, and its gradient ``[B, S, H]``."""
    difference_BSH = hidden_BSH.float() - teacher_BSH
    scale_BS1 = teacher_BSH.square().sum(-1, keepdim=True).clamp_min_(1e-12)
    total = (difference_BSH.square().sum(-1, keepdim=True) / scale_BS1).sum()
    return total, difference_BSH.mul_(2.0).div_(scale_BS1)


def _student(
    logits_TV: torch.Tensor, followers: Followers, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the teacher's followers, and the log-sum-exp."""
    if temperature != 1.0:
        logits_TV = logits_TV / temperature
    spread_T = logits_TV.logsumexp(-1)
    return logits_TV.gather(-1, followers.ids_TK) - spread_T[:, None], spread_T


def _rest_log(student_TK: torch.Tensor) -> torch.Tensor:
    """Log of the student's mass outside the teacher's followers."""
    return (1.0 - student_TK.exp().sum(-1)).clamp_min(_LEAST_MASS).log()


def _term(mass: torch.Tensor, student_log: torch.Tensor) -> torch.Tensor:
    """P (log p - log q), zero where p is."""
    entropy: torch.Tensor = torch.special.xlogy(mass, mass)
    return entropy - mass * student_log


def _lower_T(student_TK: torch.Tensor, followers: Followers) -> torch.Tensor:
    kept_TK, rest_T = followers.probabilities()
    return _term(kept_TK, student_TK).sum(-1) + _term(rest_T, _rest_log(student_TK))
