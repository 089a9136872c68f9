"""Granite 4 with experts (H-Tiny, H-Small): a shared FFN beside them, which stays whole."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.granitemoe import GRANITEMOE
from frugal_bonsai.model.families.granitemoehybrid import GRANITEMOEHYBRID
from frugal_bonsai.model.families.qwen2_moe import SHARED_PEAKS

GRANITEMOEHYBRID_EXPERTS = replace(
    GRANITEMOEHYBRID,
    stored_parts=GRANITEMOE.stored_parts,
    ffn_parts=GRANITEMOE.ffn_parts,
    ffn_output=GRANITEMOE.ffn_output,
    ffn_key=GRANITEMOE.ffn_key,
    experts=GRANITEMOE.experts,
    peaks=(*SHARED_PEAKS[:2], *GRANITEMOEHYBRID.peaks[1:]),
)
