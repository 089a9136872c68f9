"""What of a method and of a layout applies to a model: the rest is refused, or said, before work.

In: settings, layout rules, a model's description. Out: the settings that apply and what is to be
said of it. Reads nothing, and writes what a layout would write to a folder that goes again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from frugal_bonsai.bonsai.settings import EXPERTS, LATENCY, PruneSettings
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.biases import require_output_biases
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import LayoutRules

_REFIT = (
    "the experts' down_proj, and attention's projections, are refitted; gate_proj, up_proj and the "
    "router stay as they are (--refit all and --refine do not reach into experts)"
)


def settings_that_apply(
    settings: PruneSettings, given: Mapping[str, Any], spec: ModelSpec
) -> tuple[PruneSettings, tuple[str, ...]]:
    """The settings for this model, and what of the method does not apply to it.

    Args:
        settings: of the method, the user's own over them.
        given: the user's own; what they ask for is refused where it does not apply.
        spec: the model.

    Raises:
        OptionError: what the user asks for cannot be done with this model.
    """
    if settings.bias:
        require_output_biases(spec)
    if not spec.experts:
        if settings.allocation == EXPERTS:
            raise OptionError(
                f"--allocation experts: the layers of a {spec.family.model_type} have no experts; "
                "leave it out, or take another --method"
            )
        return settings, ()
    if given.get("refine"):
        raise OptionError(
            f"--refine {given['refine']}: moves the channels of one FFN, a "
            f"{spec.family.model_type} has {spec.experts} experts a layer; leave it out"
        )
    if settings.objective == LATENCY:
        raise OptionError(
            "--objective latency: what a channel costs depends on how often its expert is chosen, "
            f"which the profile of a machine does not say; leave it out for a "
            f"{spec.family.model_type}"
        )
    notes = (_REFIT,) if settings.recovery else ()
    return replace(settings, refine=0), notes


def require_layout(spec: ModelSpec, rules: LayoutRules) -> None:
    """Refuse a layout that this model cannot be written in, whatever goes.

    Its config is written for the whole model, to see whether the architecture takes it.

    Raises:
        OptionError: the layout cannot hold the model's counts, or is another family's.
        UnsupportedModelError: transformers has no model for it.
    """
    from frugal_bonsai.model.units import KeepMask
    from frugal_bonsai.rewrite.layouts import WRITE_CONFIG
    from frugal_bonsai.rewrite.layouts.mistral import as_mistral
    from frugal_bonsai.rewrite.layouts.widths import shared_config

    if rules.as_mistral:
        as_mistral(spec, shared_config(spec))
    with tempfile.TemporaryDirectory() as folder:
        WRITE_CONFIG[rules.layout](spec, KeepMask(spec.table), rules, Path(folder))
