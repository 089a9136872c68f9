"""The methods: named bundles of settings, which the user's own options override.

In: a method's name and the user's options. Out: a
:class:`~frugal_bonsai.bonsai.settings.PruneSettings`. The bundles are the project's own method, the
published algorithm, and methods to compare with. An unknown key is an error.
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

# Common settings of the methods that rank units once by one score. They are published without
# masks, rounds or refits, and remove the same share of every layer and kind (Wanda-sp as An et al.
# 2023 run it; Li et al. 2017 for norms), because such scores do not compare across layers.
_RANKED_ONCE: dict[str, Any] = {
    "level": NONE,
    "step": 1.0,
    "allocation": EQUAL,
    "recovery": False,
}
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    # Masks alone: without imputation and candidate selection.
    "group": {"compensate": False, "trial": False},
    # No masks: equal FFN widths, channels by the exact layerwise loss, attention whole. With
    # --trial candidates that remove attention compete, still without masks.
    "local-only": {"level": NONE, "allocation": FFN_ALONE, "trial": False},
    # The published settings (Bonsai, section 4 and appendix; the published code's defaults).
    "paper": {
        "level": UNIT,
        "step": 0.05,
        "prior": "wanda",
        "design": "shared",
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
    # Ranked over all layers by z-score; units of different size count alike (AL-AM).
    "fluctuation": {
        **_RANKED_ONCE,
        "prior": "flap",
        "allocation": GLOBAL,
        "objective": UNITS,
        "bias": True,
    },
    # Whole layers: those that change the direction of the residual stream least (ShortGPT).
    "depth": {**_RANKED_ONCE, "prior": SIMILARITY, "allocation": LAYERS},
    # Whole experts: those that add least to the tokens routed to them (REAP), then a refit.
    "experts": {**_RANKED_ONCE, "prior": REAP, "allocation": EXPERTS, "recovery": True},
    "wanda": {**_RANKED_ONCE, "prior": "wanda"},
    "magnitude": {**_RANKED_ONCE, "prior": "magnitude"},
    "random": {**_RANKED_ONCE, "prior": "random"},
}


# Former values and settings, and what to take instead.
_REMOVED_METHODS = {
    "unit": "coefficients of single units lost to curves by group wherever they were measured; "
    "take --method default, or --method paper for the published algorithm",
}
_REMOVED_SETTINGS = {
    "regression": "the level decides: --level group fits curves by ridge, --level unit fits the "
    "paper's regression; leave the option out",
    "draw": "--level unit draws half of each layer's candidates, as the published code does; leave "
    "the setting out",
}


def make_settings(method: str, options: Mapping[str, Any]) -> PruneSettings:
    """Return a method's settings with the user's own options over them.

    Args:
        method: One of :data:`METHODS`.
        options: Fields of :class:`PruneSettings`; None keeps the method's value.

    Raises:
        OptionError: Unknown method, unknown field, or a value that cannot work.
    """
    if method in _REMOVED_METHODS:
        raise OptionError(f"--method {method}: was removed; {_REMOVED_METHODS[method]}")
    if method not in METHODS:
        raise OptionError(f"--method: {method!r} is not one of {', '.join(METHODS)}")
    known = {field.name for field in dataclasses.fields(PruneSettings)}
    for name, value in options.items():
        if name in _REMOVED_SETTINGS and value is not None:
            raise OptionError(f"--{name}: was removed; {_REMOVED_SETTINGS[name]}")
        if name not in known and name not in _REMOVED_SETTINGS:
            raise OptionError(f"unknown setting {name!r}; known: {', '.join(sorted(known))}")
    given = {name: value for name, value in options.items() if value is not None}
    settings = PruneSettings(**{**METHODS[method], **given})
    for name in ("refine", "rescale", "self_windows"):
        if given.get(name) and not settings.recovery:
            raise OptionError(
                f"--{name.replace('_', '-')}: belongs to recovery, which --no-recovery or --method "
                f"{method} turns off; add --recovery, or leave it out"
            )
    return settings
