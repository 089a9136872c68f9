"""Output layouts: one file each, and a table of them by name.

A layout writes the pruned model's ``config.json`` and the files that this config needs. The weights
are the same in all layouts, except for the zeros that ``padded`` adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import PADDED, PER_LAYER, UNIFORM, LayoutRules
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.layouts import padded, per_layer, uniform

WriteConfig = Callable[[ModelSpec, KeepMask, LayoutRules, Path], None]

WRITE_CONFIG: Mapping[str, WriteConfig] = MappingProxyType(
    {
        UNIFORM: uniform.write_config,
        PER_LAYER: per_layer.write_config,
        PADDED: padded.write_config,
    }
)
