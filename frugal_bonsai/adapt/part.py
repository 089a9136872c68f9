"""A micro-batch on its way through a student, and the sums that come back.

In and out: tokens, what the teacher says of them, sums of the loss's terms. Holds the micro-batch.

Shape suffixes: B windows of a micro-batch, S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from frugal_bonsai.adapt.objective import Objective
from frugal_bonsai.adapt.teacher import Targets


@dataclass(frozen=True)
class Part:
    """A micro-batch.

    Attributes:
        tokens_BS: int64.
        targets: what the teacher says of them, on the CPU; None where the loss does not ask.
    """

    tokens_BS: torch.Tensor
    targets: Targets | None = None


@dataclass
class Sums:
    """Sums over tokens, in nats (``hidden``: relative squared error).

    Attributes:
        tokens: tokens that were predicted.
        lm: negative log-likelihood.
        kl: lower bound of the divergence from the teacher.
        kl_upper: its upper bound, where it was asked for.
        hidden: error of the hidden states, summed over layers too.
    """

    tokens: int = 0
    lm: float = 0.0
    kl: float = 0.0
    kl_upper: float = 0.0
    hidden: float = 0.0

    def add(self, other: Sums) -> None:
        """Add another micro-batch's."""
        for name in ("tokens", "lm", "kl", "kl_upper", "hidden"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def loss(self, objective: Objective) -> float:
        """The mean loss a token."""
        kl = objective.kl * objective.temperature**2 * self.kl
        return (objective.lm * self.lm + kl + objective.hidden * self.hidden) / max(self.tokens, 1)
