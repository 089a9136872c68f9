"""What a prune is asked to do: one frozen dataclass, checked when it is made.

In: a method's name and the user's options. Out: :class:`PruneSettings`. A method is a bundle of
settings under one name (:data:`METHODS`): the product's own, the published algorithm, and those
that both are compared with. An unknown key is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
# Conjugate-gradient steps of one refinement of the FFN's channels (refine.py).
REFINE_ITERATIONS = 4
# Rounds before the last take statistics, and recover, on this many tokens for each column of the
# widest projection (or on all windows, where they have no more): enough to choose units by.
TOKENS_PER_COLUMN = 24
# Shares that rounds remove where the user names none. In a whole model the first quarter is chosen
# as well at once; later, masks foretell small steps better.
FIRST_STEP, LATER_STEP = 0.25, 0.1
# A trial recovers each cut on this many: with fewer, cuts that need little data look better than
# they are after the last recovery, which has all windows.
TRIAL_TOKENS_PER_COLUMN = 48
# Enough for one factor: its error then costs less than a thousandth of a nat.
_SCALE_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """Everything that decides which units go and what the rest becomes.

    Attributes:
        sparsity: share of the block parameters to remove, in (0, 1).
        step: share removed in one round (the paper's p, there 0.05); None is :data:`FIRST_STEP` in
            the first round and :data:`LATER_STEP` in the others.
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
            stored codes; ``auto`` takes what the machine does faster (run/plan.py).
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


def next_goal(settings: PruneSettings, done: float) -> float:
    """The sparsity that a round aims at which begins at the sparsity ``done``."""
    step = settings.step or (LATER_STEP if done else FIRST_STEP)
    goal = min(done + step, settings.sparsity)
    # The last round removes just what is left: no sliver of a round behind it.
    return settings.sparsity if settings.sparsity - goal < 0.2 * step else goal


def round_goals(settings: PruneSettings, done: float = 0.0) -> list[float]:
    """The sparsities at which all further rounds end, if each of them reaches its aim."""
    goals: list[float] = []
    while done < settings.sparsity:
        done = next_goal(settings, done)
        goals.append(done)
    return goals


def scale_windows(window: int, windows: int) -> int:
    """Windows that the scale of the logits is found on."""
    return min(windows, max(1, _SCALE_TOKENS // window))


def trial_windows(columns: int, window: int, windows: int) -> tuple[int, int]:
    """How many calibration windows a trial recovers on, and by how many others it is judged.

    Two thirds at most, and a third as many; of one window no others are left. Judged by the windows
    that it has learnt from, a cut would look as good as it can be learnt by heart.

    Args:
        columns: of the widest output projection.
        window: tokens of a window.
        windows: calibration windows in all.
    """
    fitted = min(-(-TRIAL_TOKENS_PER_COLUMN * columns // window), max(1, windows * 2 // 3))
    return fitted, min(max(1, fitted // 3), windows - fitted)


def round_windows(settings: PruneSettings, columns: int, window: int, windows: int) -> int:
    """How many calibration windows the rounds before the last use.

    Args:
        settings: of the prune; without recovery, statistics are all there is: all windows.
        columns: of the widest output projection.
        window: tokens of a window.
        windows: calibration windows in all.
    """
    if not settings.recovery:
        return windows
    return min(windows, -(-TOKENS_PER_COLUMN * columns // window))


# What the methods that rank units once by one statistic have in common. They are published without
# masks, rounds or refits, and give every layer and kind the same share (Wanda-sp as An et al. 2023
# run it; Li et al. 2017 for norms): scores of one statistic do not compare across layers.
_RANKED_ONCE: dict[str, Any] = {
    "level": NONE,
    "step": 1.0,
    "allocation": EQUAL,
    "recovery": False,
}
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    # Masks without what the default adds to them: stand-ins and the trial of attention.
    "group": {"compensate": False, "trial": False},
    "unit": {"level": UNIT, "step": 0.05, "pool": 2.5, "trial": False},
    # No masks: equal FFN widths, channels by the exact layerwise loss, attention whole.
    "local-only": {"level": NONE, "allocation": FFN_ALONE},
    # The published settings (Bonsai, section 4 and appendix; the published code's defaults).
    "paper": {
        "level": UNIT,
        "step": 0.05,
        "prior": "wanda",
        "design": "shared",
        "draw": "layer",
        "regression": "paper",
        "utility": "perplexity",
        "masks": 200,
        "certainty": 1.0,
        "mask_windows": 32,
        "objective": UNITS,
        "pool": 2.0,
        "compensate": False,
        "trial": False,
        "recovery": False,
    },
    # Ranked over all layers by z-score, a unit like any other, whatever its parameters (AL-AM).
    "fluctuation": {
        **_RANKED_ONCE,
        "prior": "flap",
        "allocation": GLOBAL,
        "objective": UNITS,
        "bias": True,
    },
    # Whole layers, those that change the residual stream's direction least (ShortGPT).
    "depth": {**_RANKED_ONCE, "prior": SIMILARITY, "allocation": LAYERS},
    # Whole experts, those that add least where they are chosen (REAP); what is left is refitted.
    "experts": {**_RANKED_ONCE, "prior": REAP, "allocation": EXPERTS, "recovery": True},
    "wanda": {**_RANKED_ONCE, "prior": "wanda"},
    "magnitude": {**_RANKED_ONCE, "prior": "magnitude"},
    "random": {**_RANKED_ONCE, "prior": "random"},
}


def make_settings(method: str, options: Mapping[str, Any]) -> PruneSettings:
    """A method's settings with the user's own options over them.

    Args:
        method: one of :data:`METHODS`.
        options: fields of :class:`PruneSettings`; None means "as the method has it".

    Raises:
        OptionError: unknown method, unknown field, or a value that cannot work.
    """
    if method not in METHODS:
        raise OptionError(f"--method: {method!r} is not one of {', '.join(METHODS)}")
    known = {field.name for field in dataclasses.fields(PruneSettings)}
    for name in options:
        if name not in known:
            raise OptionError(f"unknown setting {name!r}; known: {', '.join(sorted(known))}")
    given = {name: value for name, value in options.items() if value is not None}
    settings = PruneSettings(**{**METHODS[method], **given})
    for name in ("refine", "rescale"):
        if given.get(name) and not settings.recovery:
            raise OptionError(
                f"--{name}: belongs to recovery, which --no-recovery or --method {method} leaves "
                "out; add --recovery, or leave it out"
            )
    return settings
