"""Checks that method and layout support a model, before any work.

In: settings, layout rules, a model's description. Out: notes about what has no effect, or a
refusal. Reads nothing; :func:`require_layout` writes configs to a temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frugal_bonsai.bonsai.selection.reach import check_reachable
from frugal_bonsai.bonsai.selection.whole import check_experts
from frugal_bonsai.bonsai.settings import EXPERTS, LATENCY, PruneSettings
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.biases import require_output_biases
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.layouts import WRITE_CONFIG
from frugal_bonsai.rewrite.layouts.mistral import as_mistral
from frugal_bonsai.rewrite.layouts.widths import shared_config

_REFIT = (
    "the experts' down_proj, and attention's projections, are refitted; gate_proj, up_proj and the "
    "router stay as they are (--refit all and --refine do not reach into experts)"
)


def check_method(
    settings: PruneSettings, given: Mapping[str, Any], spec: ModelSpec, *, profiled: bool
) -> tuple[str, ...]:
    """Check that a method supports this model.

    Args:
        settings: Settings of the method and of the user.
        given: Settings that the user names. One that the model does not support is refused, where
            a method's own is ignored.
        spec: The model.
        profiled: The user names a hardware profile.

    Returns:
        Notes about settings without effect.

    Raises:
        OptionError: The model does not support what the user asks for.
    """
    if settings.objective == LATENCY and not profiled:
        raise OptionError(
            "--objective latency: needs the rates of the machine that the model is for; measure "
            "this one with frugal-bonsai profile --out FILE, then add --profile FILE"
        )
    if settings.bias:
        require_output_biases(spec)
    if not spec.experts:
        if settings.allocation == EXPERTS:
            raise OptionError(
                f"--allocation experts: the layers of a {spec.family.model_type} have no experts; "
                "leave it out, or take another --method"
            )
        return ()
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
    return (_REFIT,) if settings.recovery else ()


def check_layout(settings: PruneSettings, rules: LayoutRules, spec: ModelSpec) -> None:
    """Check that a layout can hold this model, pruned to the target sparsity.

    The config is written for the whole model, to see whether the architecture accepts it.

    Raises:
        OptionError: The layout cannot hold the counts, or belongs to another family.
        UnsupportedModelError: transformers has no model for it.
    """
    if rules.as_mistral and settings.bias:
        raise OptionError("--as-mistral: a Mistral has no biases; leave it or --bias out")
    whole = KeepMask(spec.table)
    check_reachable(whole, settings.sparsity, rules, spec.block_parameters, settings.allocation)
    if settings.allocation == EXPERTS:
        check_experts(whole, settings.sparsity, spec.block_parameters)
    if rules.as_mistral:
        as_mistral(spec, shared_config(spec))
    with tempfile.TemporaryDirectory() as folder:
        WRITE_CONFIG[rules.layout](spec, whole, rules, Path(folder))
