"""Which family's table describes a model.

In: ``config.json``, and what the user says an unknown architecture is like. Out: the table. Reads
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from frugal_bonsai.errors import OptionError, UnsupportedModelError
from frugal_bonsai.model.families import FAMILIES
from frugal_bonsai.model.family_schema import Family


def find_family(
    config: Mapping[str, Any], *, source: str = "config.json", assume: str | None = None
) -> Family:
    """The family table for ``config["model_type"]``.

    Args:
        config: ``config.json``.
        source: its name for error texts.
        assume: the family that an architecture without a table is like, as the user says.

    Raises:
        UnsupportedModelError: there is no table; the text lists those that exist.
        OptionError: there is no such family to be like.
    """
    model_type, known = config.get("model_type"), ", ".join(sorted(FAMILIES))
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if assume is not None and isinstance(model_type, str):
        if assume not in FAMILIES:
            raise OptionError(f"--assume-family: {assume!r} is not one of {known}")
        return replace(FAMILIES[assume], model_type=model_type, assumed=assume)
    raise UnsupportedModelError(
        f"{source}: model_type {model_type!r} is not supported; supported: {known}. If its tensors "
        "have the names and meaning of one of these, try --assume-family (llama fits most); "
        "docs/adding-a-family.md says how to add one"
    )
