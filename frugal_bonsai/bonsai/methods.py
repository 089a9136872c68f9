"""The methods: bundles of settings under one name, which the user's own options override.

In: a method's name and the user's options. Out: a
:class:`~frugal_bonsai.bonsai.settings.PruneSettings`. The product's own, the published algorithm,
and those that both are compared with. An unknown key is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from frugal_bonsai.bonsai.settings import (
    EQUAL,
    EXPERTS,
    FFN_ALONE,
    GLOBAL,
    LAYERS,
    NONE,
    REAP,
    SIMILARITY,
    UNIT,
    UNITS,
    PruneSettings,
)
from frugal_bonsai.errors import OptionError

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
