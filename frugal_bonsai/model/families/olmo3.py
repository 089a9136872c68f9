"""OLMo 3: OLMo 2 with sliding windows in three of four layers."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.olmo2 import OLMO2

OLMO3 = replace(OLMO2, model_type="olmo3", models="OLMo 3", masks=1)
