"""What a prune is asked to do: one frozen dataclass, checked when it is made.

:mod:`frugal_bonsai.bonsai.methods` makes it of a method's name and the user's options;
:mod:`frugal_bonsai.bonsai.selection.extent` says how far its rounds go and how much text they use.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from frugal_bonsai.errors import OptionError

SIMILARITY, REAP = "similarity", "reap"
PRIOR_NAMES = (
    "activation",
    "wanda",
    "output",
    "fluctuation",
    "flap",
    "exact",
    "magnitude",
    "random",
    SIMILARITY,
    REAP,
)
GROUP, UNIT, NONE = "group", "unit", "none"
LEVELS = (GROUP, UNIT, NONE)
PARAMETERS, UNITS, LATENCY = "parameters", "units", "latency"
OBJECTIVES = (PARAMETERS, UNITS, LATENCY)
GLOBAL, EQUAL, FFN_ALONE, LAYERS = "global", "equal", "ffn", "layers"
EXPERTS = "experts"
ALLOCATIONS = (GLOBAL, EQUAL, FFN_ALONE, LAYERS, EXPERTS)
# Allocations that take what is larger than a unit, whole, and the prior that measures it.
WHOLE = {LAYERS: SIMILARITY, EXPERTS: REAP}
DESIGNS = ("per-window", "shared")
REGRESSIONS = ("ridge", "paper")
UTILITIES = ("loss", "perplexity")
REFITS = ("outputs", "all")


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """Everything that decides which units go and what the rest becomes.

    Attributes:
        sparsity: share of the block parameters to remove, in (0, 1).
        step: share removed in one round (the paper's p, there 0.05); None is ``FIRST_STEP``
            of extent.py in the first round and ``LATER_STEP`` in the others.
        level: at which masks speak: ``group`` (masks say how much goes from each layer and kind,
            the prior says which units), ``unit`` (every candidate unit has its own coefficient),
            ``none`` (no masks: the prior alone).
        prior: one of the statistics of prior.py.
        design: ``per-window`` or ``shared`` (the paper's).
        draw: of ``unit`` masks: half of a ``kind``'s candidates over all layers, or half of each
            ``layer``'s (the published code).
        regression: ``ridge`` (non-negative curves for ``group``) or ``paper``.
        utility: ``loss`` (-mean NLL) or ``perplexity`` (-exp of it).
        masks: masks a round on every mask window, at most (even; half of them complements).
        certainty: a round stops drawing masks when its cut is as certain as this: one less the
            share of its predicted loss that knowing everything would save. 1 spends all masks.
        mask_windows: windows that masks are evaluated on.
        objective: what a cut's loss is counted against: ``parameters``, ``units`` (the published
            code) or ``latency``, milliseconds that the machine of the profile saves.
        prompt_tokens: of the prompt that ``latency`` is counted for: a prefill of so many tokens,
        generated_tokens: and as many steps of one token, each reading all weights.
        allocation: which groups a cut takes from: ``global``, wherever it costs least; ``equal``,
            the same share of every layer and kind, as near as units allow; ``ffn``, the same of
            every FFN, attention stays whole; ``layers``, whole layers by the prior ``similarity``;
            ``experts``, whole experts by the prior ``reap``. All but the first need level ``none``.
        pool: candidates of a group, as a multiple of the round's share.
        compensate: units that are off in a mask are replaced by what the others say about them, so
            that masks measure what removal costs after recovery; False puts zeros there.
        trial: a cut is recovered on a part of the windows and judged by others, and so are cuts of
            the same size that take the same share of every FFN, with and without attention; the one
            that leaves attention whole stands unless another is clearly better (per-layer layout).
        recovery: refit projections after every round.
        bias: instead, what goes leaves its mean output behind as a bias of its output projection
            (FLAP); for cuts without masks.
        refit: which ones: ``outputs`` (o_proj, down_proj) or ``all`` (q, k, v, gate, up too).
        refine: how often the last round's recovery moves the FFN's remaining channels (a linearised
            least-squares problem in gate and up) and refits down_proj again; 0 never.
        rescale: the last round's recovery scales the final norm, and with it the logits, as what is
            left of the model needs (logit_scale.py).
        ridge: recovery's lambda as a share of the Gram matrix's mean diagonal; the ``exact`` prior
            is the loss that a refit with this lambda leaves.
        seed: of every random draw.
        weights: ``int8`` or ``native`` working store.
        arithmetic: of masked evaluation: ``float`` multiplies in the compute dtype, ``int8`` the
            stored codes; ``auto`` takes what the machine does faster (run/resolve.py).
    """

    sparsity: float = 0.5
    step: float | None = None
    level: str = GROUP
    prior: str = "exact"
    design: str = "per-window"
    draw: str = "kind"
    regression: str = "ridge"
    utility: str = "loss"
    masks: int = 16
    certainty: float = 0.8
    mask_windows: int = 16
    objective: str = PARAMETERS
    prompt_tokens: int = 512
    generated_tokens: int = 128
    allocation: str = GLOBAL
    pool: float = 2.0
    compensate: bool = True
    trial: bool = True
    recovery: bool = True
    bias: bool = False
    refit: str = "all"
    refine: int = 2
    rescale: bool = True
    ridge: float = 1e-3
    seed: int = 0
    weights: str = "int8"
    arithmetic: str = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise OptionError(f"--sparsity: {self.sparsity} is outside (0, 1); write 0.5 for 50%")
        if self.step is not None and not 0 < self.step <= 1:
            raise OptionError(f"--step: {self.step} is outside (0, 1]; write 0.05 for 5%")
        for name, choices in (
            ("level", LEVELS),
            ("prior", PRIOR_NAMES),
            ("design", DESIGNS),
            ("draw", ("kind", "layer")),
            ("regression", REGRESSIONS),
            ("utility", UTILITIES),
            ("objective", OBJECTIVES),
            ("allocation", ALLOCATIONS),
            ("refit", REFITS),
            ("weights", ("int8", "native")),
            ("arithmetic", ("auto", "float", "int8")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise OptionError(f"--{name}: {value!r} is not one of {', '.join(choices)}")
        if self.level == GROUP and self.regression == "paper":
            raise OptionError(
                "--regression: paper explains single units, --level group fits curves of its own; "
                "take --level unit, or --regression ridge"
            )
        if self.level != NONE and self.allocation != GLOBAL:
            raise OptionError(
                f"--allocation {self.allocation}: decides what masks are to decide at --level "
                f"{self.level}; take --level none, or --allocation global"
            )
        if self.bias and (self.recovery or self.level != NONE):
            raise OptionError(
                "--bias: is what cuts without masks and without refits leave behind; take it with "
                "--level none --no-recovery, or leave it out"
            )
        for whole, prior in WHOLE.items():
            if (self.allocation == whole) != (self.prior == prior):
                raise OptionError(
                    f"--prior {self.prior}: --allocation {whole} and --prior {prior} go together, "
                    f"one measures {whole} and the other takes them; or take --method "
                    f"{'depth' if whole == LAYERS else EXPERTS}"
                )
        if self.allocation == LAYERS and (self.recovery or self.bias):
            raise OptionError(
                "--allocation layers: leaves nothing in a dropped layer that could be refitted; "
                "take it with --no-recovery and --no-bias"
            )
        if self.masks < 2 or self.masks % 2:
            raise OptionError(f"--masks: {self.masks} is not an even number of at least 2")
        if not 0 < self.certainty <= 1:
            raise OptionError(
                f"--certainty: {self.certainty} is outside (0, 1]; 1 spends all masks of a round"
            )
        if self.mask_windows < 1:
            raise OptionError(f"--mask-windows: {self.mask_windows} is not at least 1")
        if self.pool < 1:
            raise OptionError(f"--pool: {self.pool} is below 1, the cut would not fit in the pool")
        if self.refine < 0:
            raise OptionError(f"--refine: {self.refine} is negative")
        if not 0 < self.ridge <= 1:
            raise OptionError(f"--ridge: {self.ridge} is outside (0, 1]")
        if self.arithmetic == "int8" and self.weights != "int8":
            raise OptionError(
                f"--arithmetic int8: needs --weights int8, found {self.weights}; leave one out"
            )
        if self.prompt_tokens < 1:
            raise OptionError(f"--prompt-tokens: {self.prompt_tokens} is not at least 1")
        if self.generated_tokens < 0:
            raise OptionError(f"--generated-tokens: {self.generated_tokens} is negative")
        if self.objective == LATENCY and self.allocation != GLOBAL:
            raise OptionError(
                f"--objective latency: weighs groups against each other, --allocation "
                f"{self.allocation} does not; take --allocation global"
            )
        if self.seed < 0:
            raise OptionError(f"--seed: {self.seed} is negative")

    def stand_ins(self, *, uniform: bool) -> bool:
        """Whether masks are evaluated with stand-ins: where pools are shares of every group."""
        return self.compensate and self.level == GROUP and not uniform

    def tries(self, *, uniform: bool) -> bool:
        """Whether cuts of attention are tried: at equal parameters, so not for ``latency``."""
        return self.trial and self.recovery and not uniform and self.objective != LATENCY

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the state and the card."""
        return dataclasses.asdict(self)
