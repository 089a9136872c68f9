"""MiniMax-M2: norms over all heads of q and of k, a router with a bias for its choice alone."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.expert_schema import Experts
from frugal_bonsai.model.families.mixtral import MIXTRAL
from frugal_bonsai.model.families.olmo2 import OLMO2
from frugal_bonsai.model.families.olmoe import OLMOE

MINIMAX_M2 = replace(
    MIXTRAL,
    model_type="minimax_m2",
    models="MiniMax-M2",
    unread=(*MIXTRAL.unread, "mtp."),
    experts=Experts(router_bias="mlp.e_score_correction_bias", chosen_default=8),
    exact=(".e_score_correction_bias",),
    defaults={"num_key_value_heads": 8},
    peaks=OLMOE.peaks,
    masks=0,
    whole_attention=OLMO2.whole_attention,
)
