"""The settings of a training, and its learning rate.

In: the user's options. Out: a frozen, validated :class:`AdaptSettings`, which the model's width and
the memory plan complete (:meth:`AdaptSettings.resolve`). Imports no torch. Holds no tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from frugal_bonsai.errors import OptionError
from frugal_bonsai.memory.training_items import ADAMW, ADAMW_8BIT

LORA, FULL = "lora", "full"
METHODS = (LORA, FULL)
LM, KL, KL_HIDDEN = "lm", "kl", "kl+hidden"
LOSSES = (LM, KL, KL_HIDDEN)
AUTO = "auto"
OPTIMISERS = (AUTO, ADAMW, ADAMW_8BIT)

# The default peak learning rate times the hidden size: with Adam the best rate is inversely
# proportional to the width (Yang et al. 2022, Tensor Programs V, table 3). Tuned on a model with
# 192 hidden channels, where three times the adapters' rate diverges (docs/results).
RATE_TIMES_HIDDEN = {LORA: 0.384, FULL: 0.096}
DEFAULT_PASSES = 4


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Weights of the terms of the loss.

    Attributes:
        lm: weight of the text's negative log-likelihood.
        kl: weight of the divergence from the teacher. The term is also multiplied by the squared
            temperature, which keeps the size of its gradients (Hinton et al. 2015, section 2).
        hidden: weight of the relative squared error of hidden states.
        temperature: temperature of the teacher's cached probabilities.
    """

    lm: float
    kl: float = 0.0
    hidden: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lm", "kl", "hidden"):
            if not 0.0 <= getattr(self, name) < 1e6:
                raise OptionError(
                    f"--{name}-weight: {getattr(self, name)} is not a number from 0 to 1e6"
                )
        if not self.lm + self.kl + self.hidden > 0.0:
            raise OptionError(
                "the loss has no term, because all its weights are 0; set --lm-weight, --kl-weight "
                "or --hidden-weight to a positive number"
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether a term of the loss uses the teacher."""
        return self.kl > 0.0 or self.hidden > 0.0


@dataclass(frozen=True, kw_only=True)
class AdaptSettings:
    """Settings of a training. None leaves a value to :meth:`resolve`.

    Attributes:
        method: ``"lora"``, or ``"full"`` to train the block projections themselves.
        loss: ``"lm"``, ``"kl"`` or ``"kl+hidden"``.
        lm_weight: weight of language modelling; 0 trains on the teacher alone, which was worse than
            both together (docs/results).
        kl_weight: weight of the divergence from the teacher.
        hidden_weight: weight of the hidden states' error.
        rank: rank of the adapters; by default the largest that the memory plan fits.
        optimiser: ``"adamw"``, ``"adamw8bit"``, or ``"auto"``: the plan chooses 8-bit moments if
            fp32 moments do not fit.
        alpha: the adapters' product is scaled by alpha / rank; by default twice the rank.
        learning_rate: peak learning rate; by default inversely proportional to the hidden size.
        warm_up: share of the training in which the learning rate rises.
        batch: number of windows of a step.
        tokens: number of tokens to train on; by default four passes, unless ``seconds`` is set.
        seconds: time to train for, with held-out measurements.
        evaluations: number of held-out measurements during the training.
        clip: largest norm of the gradient.
        seed: seeds the adapters' initial values and the order of the windows.
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
            raise OptionError(f"--warm-up: {self.warm_up} is not in 0..1, 1 excluded")
        if self.tokens is not None and self.seconds is not None:
            raise OptionError("--tokens and --minutes: both say when to stop; name one of them")

    def objective(self, temperature: float) -> Objective:
        """Return the weights of the loss's terms."""
        return Objective(
            lm=self.lm_weight,
            kl=0.0 if self.loss == LM else self.kl_weight,
            hidden=self.hidden_weight if self.loss == KL_HIDDEN else 0.0,
            temperature=temperature,
        )

    def resolve(self, *, hidden: int, rank: int) -> AdaptSettings:
        """Return settings with learning rate, rank and alpha.

        Args:
            hidden: the model's hidden size.
            rank: the rank that the memory plan has chosen; unused without adapters.
        """
        rate = self.learning_rate
        if rate is None:
            rate = RATE_TIMES_HIDDEN[self.method] / hidden
        if self.method == FULL:
            return replace(self, learning_rate=rate)
        alpha = 2.0 * rank if self.alpha is None else self.alpha
        return replace(self, learning_rate=rate, rank=rank, alpha=alpha)

    @property
    def scaling(self) -> float:
        """Factor of the adapters' product B A, of resolved settings; 1 without adapters."""
        if self.method == FULL:
            return 1.0
        assert self.alpha is not None and self.rank is not None
        return self.alpha / self.rank

    def rate(self, share: float) -> float:
        """Return the learning rate after a share of the training: a linear rise, half a cosine."""
        assert self.learning_rate is not None
        if share < self.warm_up:
            return self.learning_rate * share / self.warm_up
        left = (share - self.warm_up) / (1.0 - self.warm_up)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(left, 1.0)))
