"""FlexOlmo: OLMo 2 with the experts of OLMoE, and a norm behind their sum."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.mixtral import EXPERT_OUTPUT, EXPERT_PARTS
from frugal_bonsai.model.families.olmo2 import OLMO2
from frugal_bonsai.model.families.olmoe import OLMOE
from frugal_bonsai.model.family_schema import Peak

FLEX_OLMO = replace(
    OLMO2,
    model_type="flex_olmo",
    models="FlexOlmo",
    ffn_parts=EXPERT_PARTS,
    ffn_output=EXPERT_OUTPUT,
    experts=OLMOE.experts,
    # No norm precedes the experts.
    peaks=(Peak(hidden=4, ffn=3), Peak(hidden=5, ffn=2), *OLMO2.peaks[1:]),
)
