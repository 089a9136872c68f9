"""The settings of a prune: one frozen dataclass, checked when it is made.

:mod:`frugal_bonsai.bonsai.methods` makes it from a method's name and the user's options.
:mod:`frugal_bonsai.bonsai.selection.schedule` derives from it how far rounds go and how much text
they use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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
# Allocations that remove more than a unit at once, and the importance score that ranks for them.
WHOLE = {LAYERS: SIMILARITY, EXPERTS: REAP}
DESIGNS = ("per-window", "shared")
UTILITIES = ("loss", "perplexity")
# File of a run directory that names the last finished round.
STATE_FILE = "state.json"
REFITS = ("outputs", "all")


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """Everything that decides which units go and how the rest is refitted.

    Attributes:
        sparsity: Share of the block parameters to remove, in (0, 1).
        step: Share removed in one round (p in the paper, there 0.05). None uses ``FIRST_STEP`` of
            selection/schedule.py in the first round and ``LATER_STEP`` in the others.
        level: What masks decide. ``group``: how much of each layer and kind goes, while importance
            orders the units. ``unit``: every candidate unit (the paper). ``none``: nothing; no
            masks are evaluated and importance alone decides.
        prior: Importance score, one of importance/scores.py.
        design: ``per-window`` (each window has masks of its own) or ``shared`` (the paper).
        utility: ``loss`` (-mean NLL) or ``perplexity`` (-exp of the mean NLL).
        masks: Most masks per round on every mask window; even, half of them are complements.
        certainty: A round stops drawing masks when its cut is this certain: 1 minus the share of
            the predicted loss that perfect information would save. 1 evaluates all masks.
        mask_windows: Number of windows on which masks are evaluated.
        objective: Divisor of a cut's loss: ``parameters``, ``units`` (the published code) or
            ``latency``, the milliseconds saved on the machine of the profile.
        prompt_tokens: Length of the prompt for ``latency``.
        generated_tokens: Number of decode steps for ``latency``.
        allocation: Where a cut takes from. ``global``: wherever it costs least. ``equal``: the same
            share of every layer and kind. ``ffn``: the same share of every FFN; attention stays
            whole. ``layers``: whole layers by the score ``similarity``. ``experts``: whole experts
            by the score ``reap``. All but ``global`` need level ``none``.
        pool: Candidates of a group, as a multiple of the share that the round removes.
        compensate: Masks replace units that are off by a linear prediction from the others, and so
            measure what removal costs after reconstruction. False puts zeros there.
        trial: Reconstruct the round's cut and cuts with equal FFN widths on a part of the windows
            and select by the loss on others (``per-layer`` and ``padded`` layouts).
        recovery: Refit projections after every round.
        bias: Instead of a refit, add the mean output of removed units to the bias of the output
            projection (FLAP); for level ``none``.
        refit: Projections that are refitted: ``outputs`` (o_proj, down_proj) or ``all`` (also q, k,
            v, gate, up).
        refine: Channel updates in the last round (each moves the FFN's remaining channels and
            refits down_proj); 0 for none.
        self_windows: Number of windows that the dense model writes for the last reconstruction,
            beside the calibration windows. None decides by the calibration and the memory plan.
        rescale: Scale the logits in the last round, through the final norm.
        ridge: Penalty of the refits as a share of the Gram matrix's mean diagonal; the score
            ``exact`` is the loss that a refit with this penalty leaves.
        seed: Seed of every random draw.
        weights: Precision of the working store, ``int8`` or ``native``.
        arithmetic: Arithmetic of masked evaluation: ``float`` multiplies in the compute dtype,
            ``int8`` multiplies the stored codes, ``auto`` uses the faster one of the machine.
    """

    sparsity: float = 0.5
    step: float | None = None
    level: str = GROUP
    prior: str = "exact"
    design: str = "per-window"
    utility: str = "loss"
    masks: int = 8
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
    self_windows: int | None = None
    rescale: bool = True
    ridge: float = 1e-3
    seed: int = 0
    weights: str = "int8"
    arithmetic: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise OptionError(f"--{name}: {value!r} is not one of {', '.join(choices)}")
        _require_share("--sparsity", self.sparsity, whole=False)
        if self.step is not None:
            _require_share("--step", self.step, whole=True)
        for rule in _RULES:
            if rule.is_broken(self):
                raise OptionError(rule.refusal.format(s=self))

    def imputes(self, *, uniform: bool) -> bool:
        """Tell whether masks impute values: where pools are shares of every group."""
        return self.compensate and self.level == GROUP and not uniform

    def selects_candidates(self, *, uniform: bool) -> bool:
        """Tell whether rounds select among candidates; they are equal in parameters, not time."""
        return self.trial and self.recovery and not uniform and self.objective != LATENCY

    def to_json(self) -> dict[str, Any]:
        """Return plain values for the state and the card."""
        return dataclasses.asdict(self)


_CHOICES: dict[str, tuple[str, ...]] = {
    "level": LEVELS,
    "prior": PRIOR_NAMES,
    "design": DESIGNS,
    "utility": UTILITIES,
    "objective": OBJECTIVES,
    "allocation": ALLOCATIONS,
    "refit": REFITS,
    "weights": ("int8", "native"),
    "arithmetic": ("auto", "float", "int8"),
}


def _require_share(option: str, value: float, *, whole: bool) -> None:
    """Raise unless a value is a share above 0 and below 1; ``whole`` allows 1."""
    if 0 < value < 1 or (whole and value == 1):
        return
    meant = f"did you mean {value / 100:g}?" if 1 < value < 100 else "write 0.5 for 50%"
    raise OptionError(f"{option}: {value} is outside (0, 1{']' if whole else ')'}; {meant}")


class _Rule(NamedTuple):
    """A combination of settings that is refused, and the error's text with settings as ``s``."""

    is_broken: Callable[[PruneSettings], bool]
    refusal: str


_RULES = (
    _Rule(
        lambda s: s.masks < 2 or s.masks % 2 == 1,
        "--masks: {s.masks} is not an even number of at least 2",
    ),
    _Rule(
        lambda s: not 0 < s.certainty <= 1,
        "--certainty: {s.certainty} is outside (0, 1]; 1 evaluates all masks of a round",
    ),
    _Rule(lambda s: s.mask_windows < 1, "--mask-windows: {s.mask_windows} is not at least 1"),
    _Rule(lambda s: s.prompt_tokens < 1, "--prompt-tokens: {s.prompt_tokens} is not at least 1"),
    _Rule(lambda s: s.generated_tokens < 0, "--generated-tokens: {s.generated_tokens} is negative"),
    _Rule(
        lambda s: s.pool < 1,
        "--pool: {s.pool} is below 1; a pool must hold at least the units that the round removes",
    ),
    _Rule(lambda s: s.refine < 0, "--refine: {s.refine} is negative"),
    _Rule(
        lambda s: (s.self_windows or 0) < 0,
        "--self-windows: {s.self_windows} is negative; 0 writes no text",
    ),
    _Rule(lambda s: not 0 < s.ridge <= 1, "--ridge: {s.ridge} is outside (0, 1]"),
    _Rule(lambda s: s.seed < 0, "--seed: {s.seed} is negative"),
    _Rule(
        lambda s: s.level != NONE and s.allocation != GLOBAL,
        "--allocation {s.allocation}: fixes what masks decide at --level {s.level}; take --level "
        "none, or --allocation global",
    ),
    _Rule(
        lambda s: s.bias and (s.recovery or s.level != NONE),
        "--bias: replaces refits in cuts without masks; take it with --level none --no-recovery, "
        "or leave it out",
    ),
    _Rule(
        lambda s: (s.allocation == LAYERS) != (s.prior == SIMILARITY),
        "--prior {s.prior}: --allocation layers and --prior similarity go together, one removes "
        "layers and the other ranks them; or take --method depth",
    ),
    _Rule(
        lambda s: (s.allocation == EXPERTS) != (s.prior == REAP),
        "--prior {s.prior}: --allocation experts and --prior reap go together, one removes experts "
        "and the other ranks them; or take --method experts",
    ),
    _Rule(
        lambda s: s.allocation == LAYERS and (s.recovery or s.bias),
        "--allocation layers: a dropped layer has no projection left to refit; take it with "
        "--no-recovery and --no-bias",
    ),
    _Rule(
        lambda s: s.objective == LATENCY and s.allocation != GLOBAL,
        "--objective latency: compares groups, --allocation {s.allocation} does not; take "
        "--allocation global",
    ),
    _Rule(
        lambda s: s.arithmetic == "int8" and s.weights != "int8",
        "--arithmetic int8: needs --weights int8, found {s.weights}; leave one out",
    ),
)
