"""How a student is trained.

In: what the user says. Out: a frozen, checked :class:`AdaptSettings`, and from its place in the
schedule a learning rate. Holds nothing.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from frugal_bonsai.adapt.adapters import FULL, LORA, METHODS
from frugal_bonsai.adapt.objective import KL, KL_HIDDEN, LM, LOSSES, Objective
from frugal_bonsai.adapt.optimiser import AUTO, OPTIMISERS
from frugal_bonsai.errors import OptionError

# The learning rate at the top of the schedule when the user names none, times the hidden size: with
# Adam the best one falls as a model gets wider (Yang et al. 2022, Tensor Programs V, table 3). Set
# on a model of 192: three times the adapters' makes it diverge (docs/results).
RATE_TIMES_HIDDEN = {LORA: 0.384, FULL: 0.096}
DEFAULT_PASSES = 4


@dataclass(frozen=True, kw_only=True)
class AdaptSettings:
    """What a user may say about the training itself.

    Attributes:
        method: ``"lora"`` or ``"full"`` (the block projections themselves).
        loss: ``"lm"``, ``"kl"`` or ``"kl+hidden"``.
        lm_weight: of language modelling; 0 leaves the teacher alone, which came out worse than both
            together (docs/results).
        kl_weight: of the divergence from the teacher.
        hidden_weight: of the hidden states' error.
        rank: of the adapters; None lets the plan choose.
        optimiser: ``"adamw"``, ``"adamw8bit"``, or ``"auto"``: the plan takes 8-bit moments where
            those in fp32 do not fit.
        alpha: the adapters' product counts alpha / rank; None is twice the rank.
        learning_rate: at the top of the schedule; None goes by the
            model's width, see :meth:`for_width`.
        warm_up: share of the training in which the rate rises.
        batch: windows of one step.
        tokens: to train on; None is four passes over the windows, unless ``seconds`` is given.
        seconds: to train for, held-out measurements included.
        evaluations: how often the held-out perplexity is watched.
        clip: largest norm of the gradient.
        seed: of the adapters' first values and the windows' order.
    """

    method: str = LORA
    loss: str = KL
    lm_weight: float = 1.0
    kl_weight: float = 1.0
    hidden_weight: float = 1.0
    rank: int | None = None
    optimiser: str = AUTO
    alpha: float | None = None
    learning_rate: float | None = None
    warm_up: float = 0.03
    batch: int = 8
    tokens: int | None = None
    seconds: float | None = None
    evaluations: int = 10
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(f"--method: {self.method!r} is not one of {', '.join(METHODS)}")
        if self.loss not in LOSSES:
            raise OptionError(f"--loss: {self.loss!r} is not one of {', '.join(LOSSES)}")
        if self.optimiser not in OPTIMISERS:
            raise OptionError(
                f"--optimizer: {self.optimiser!r} is not one of {', '.join(OPTIMISERS)}"
            )
        for name in ("rank", "batch", "tokens", "evaluations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"--{name}: {value} is not at least 1")
        for name in ("alpha", "learning_rate", "seconds", "clip"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                option = "--minutes" if name == "seconds" else f"--{name.replace('_', '-')}"
                raise OptionError(f"{option}: {value} is not a positive number")
        if not 0.0 <= self.warm_up < 1.0:
            raise OptionError(f"--warm-up: {self.warm_up} is not a share from 0 to below 1")
        if self.tokens is not None and self.seconds is not None:
            raise OptionError("--tokens and --minutes: both say when to stop; give one of them")

    def objective(self, temperature: float) -> Objective:
        """The weights of the loss's terms."""
        return Objective(
            lm=self.lm_weight,
            kl=0.0 if self.loss == LM else self.kl_weight,
            hidden=self.hidden_weight if self.loss == KL_HIDDEN else 0.0,
            temperature=temperature,
        )

    def for_width(self, hidden: int) -> AdaptSettings:
        """With a learning rate for this hidden size, where the user names none."""
        if self.learning_rate is not None:
            return self
        return replace(self, learning_rate=RATE_TIMES_HIDDEN[self.method] / hidden)

    def rate(self, share: float) -> float:
        """The learning rate when this share of the training is done: up, then half a cosine."""
        assert self.learning_rate is not None
        if share < self.warm_up:
            return self.learning_rate * share / self.warm_up
        left = (share - self.warm_up) / (1.0 - self.warm_up)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(left, 1.0)))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
