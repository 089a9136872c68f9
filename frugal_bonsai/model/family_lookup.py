"""Find the family whose table describes a model.

In: ``config.json``, and optionally the family that the user assumes for an unknown architecture.
Out: the table. Reads no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from frugal_bonsai.errors import OptionError, UnsupportedModelError
from frugal_bonsai.model.families import FAMILIES, VARIANTS
from frugal_bonsai.model.families.unsupported import UNSUPPORTED
from frugal_bonsai.model.family_schema import Family


def find_family(
    config: Mapping[str, Any], *, source: str = "config.json", assume: str | None = None
) -> Family:
    """Return the family table for ``config["model_type"]``.

    Args:
        config: ``config.json``.
        source: file name for error texts.
        assume: name of the family whose table to use for an architecture without one.

    Raises:
        UnsupportedModelError: the architecture has no table. The text lists those that have one.
        OptionError: ``assume`` names no family.
    """
    model_type, known = config.get("model_type"), ", ".join(sorted(FAMILIES))
    if isinstance(model_type, str) and model_type in FAMILIES:
        variants = VARIANTS.get(model_type, ())
        own = (family for condition, family in variants if condition.holds(config))
        return next(own, FAMILIES[model_type])
    if assume is not None and isinstance(model_type, str):
        if assume not in FAMILIES:
            raise OptionError(f"--assume-family: {assume!r} is not one of {known}")
        return replace(FAMILIES[assume], model_type=model_type, assumed=assume)
    if isinstance(model_type, str) and model_type in UNSUPPORTED:
        raise UnsupportedModelError(
            f"{source}: model_type {model_type!r} is not supported, because "
            f"{UNSUPPORTED[model_type]}; take a model of a supported family: {known}"
        )
    raise UnsupportedModelError(
        f"{source}: model_type {model_type!r} is not supported; supported: {known}. If its tensors "
        "have the names and meaning of one of these, try --assume-family (llama fits most); "
        "docs/adding-a-family.md explains how to add a family"
    )
