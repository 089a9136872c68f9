"""What a prune is asked to do: one frozen dataclass, checked when it is made.

In: the user's options. Out: :class:`PruneSettings`; ``preset`` gives the bundles of METHOD. An
unknown key is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from frugal_bonsai.errors import OptionError

PRIOR_NAMES = (
    "activation",
    "wanda",
    "output",
    "fluctuation",
    "exact",
    "magnitude",
    "random",
)
METHODS = ("group", "unit", "local")
DESIGNS = ("per-window", "shared")
REGRESSIONS = ("ridge", "paper")
UTILITIES = ("loss", "perplexity")
REFITS = ("outputs", "all")
# Conjugate-gradient steps of one refinement of the FFN's channels (refine.py).
REFINE_ITERATIONS = 4
# Rounds before the last take statistics, and recover, on this many tokens for each column of the
# widest projection (or on all windows, where they have no more): enough to choose units by.
TOKENS_PER_COLUMN = 24


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """Everything that decides which units go and what the rest becomes.

    Attributes:
        sparsity: share of the block parameters to remove, in (0, 1).
        step: share removed in one round (the paper's p).
        method: ``group`` (masks say how much goes from each layer and kind, the prior says which
            units), ``unit`` (every candidate unit has its own coefficient), ``local`` (no masks:
            the prior alone).
        prior: one of the seven statistics.
        design: ``per-window`` or ``shared`` (the paper's).
        draw: of ``unit`` masks: half of a ``kind``'s candidates over all layers, or half of each
            ``layer``'s (the published code).
        regression: ``ridge`` (non-negative curves for ``group``) or ``paper``.
        utility: ``loss`` (-mean NLL) or ``perplexity`` (-exp of it).
        masks: masks a round on every mask window (even; half of them complements).
        mask_windows: windows that masks are evaluated on.
        per: what a cut's loss is counted against, ``parameter`` or ``unit`` (the published code).
        pool: candidates of a group, as a multiple of the round's share.
        compensate: units that are off in a mask are replaced by what the others say about them, so
            that masks measure what removal costs after recovery; False puts zeros there.
        trial: a cut that takes attention units is recovered on a few windows, and so is the cut of
            the same size that takes none; the better one stands (per-layer layout).
        recovery: refit projections after every round.
        refit: which ones: ``outputs`` (o_proj, down_proj) or ``all`` (q, k, v, gate, up too).
        refine: how often the last round's recovery moves the FFN's remaining channels (a linearised
            least-squares problem in gate and up) and refits down_proj again; 0 never.
        ridge: recovery's lambda as a share of the Gram matrix's mean diagonal; the ``exact`` prior
            is the loss that a refit with this lambda leaves.
        seed: of every random draw.
        weights: ``int8`` or ``native`` working store.
        arithmetic: of masked evaluation: ``float`` multiplies in the compute dtype, ``int8`` the
            stored codes; ``auto`` takes what the machine does faster (run/plan.py).
    """

    sparsity: float = 0.5
    step: float = 0.05
    method: str = "group"
    prior: str = "exact"
    design: str = "per-window"
    draw: str = "kind"
    regression: str = "ridge"
    utility: str = "loss"
    masks: int = 8
    mask_windows: int = 16
    per: str = "parameter"
    pool: float = 2.5
    compensate: bool = True
    trial: bool = True
    recovery: bool = True
    refit: str = "all"
    refine: int = 2
    ridge: float = 1e-3
    seed: int = 0
    weights: str = "int8"
    arithmetic: str = "auto"

    def __post_init__(self) -> None:
        for name in ("sparsity", "step"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise OptionError(f"--{name}: {value} is outside (0, 1); write 0.5 for 50%")
        for name, choices in (
            ("method", METHODS),
            ("prior", PRIOR_NAMES),
            ("design", DESIGNS),
            ("draw", ("kind", "layer")),
            ("regression", REGRESSIONS),
            ("utility", UTILITIES),
            ("per", ("parameter", "unit")),
            ("refit", REFITS),
            ("weights", ("int8", "native")),
            ("arithmetic", ("auto", "float", "int8")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise OptionError(f"--{name}: {value!r} is not one of {', '.join(choices)}")
        if self.method == "group" and self.regression == "paper":
            raise OptionError(
                "--regression: paper explains single units, --method group fits curves of its own; "
                "take --method unit, or --regression ridge"
            )
        if self.masks < 2 or self.masks % 2:
            raise OptionError(f"--masks: {self.masks} is not an even number of at least 2")
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
        if self.seed < 0:
            raise OptionError(f"--seed: {self.seed} is negative")

    def stand_ins(self, *, uniform: bool) -> bool:
        """Whether masks are evaluated with stand-ins: where pools are shares of every group."""
        return self.compensate and self.method == "group" and not uniform

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the state and the card."""
        return dataclasses.asdict(self)


# Windows that a trial recovers on, as a share of a round's.
TRIAL_SHARE = 0.5


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


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # The published settings (Bonsai, section 4 and appendix; the published code's defaults).
    "paper": {
        "method": "unit",
        "prior": "wanda",
        "design": "shared",
        "draw": "layer",
        "regression": "paper",
        "utility": "perplexity",
        "masks": 200,
        "mask_windows": 32,
        "per": "unit",
        "pool": 2.0,
        "compensate": False,
        "trial": False,
        "recovery": False,
    },
}


def make_settings(preset: str, options: Mapping[str, Any]) -> PruneSettings:
    """A preset with the user's own options over it.

    Args:
        preset: ``default`` or ``paper``.
        options: fields of :class:`PruneSettings`; None means "as the preset has it".

    Raises:
        OptionError: unknown preset, unknown field, or a value that cannot work.
    """
    if preset not in PRESETS:
        raise OptionError(f"--preset: {preset!r} is not one of {', '.join(PRESETS)}")
    known = {field.name for field in dataclasses.fields(PruneSettings)}
    for name in options:
        if name not in known:
            raise OptionError(f"unknown setting {name!r}; known: {', '.join(sorted(known))}")
    given = {name: value for name, value in options.items() if value is not None}
    return PruneSettings(**{**PRESETS[preset], **given})
