"""Apertus: a norm over each query and key head, an FFN without a gate and a learnt activation."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.arcee import ARCEE
from frugal_bonsai.model.families.hunyuan_v1_dense import HUNYUAN_V1_DENSE
from frugal_bonsai.model.family_schema import Peak

APERTUS = replace(
    ARCEE,
    model_type="apertus",
    models="Apertus",
    heads_divide_hidden=False,
    bias_keys=HUNYUAN_V1_DENSE.bias_keys,
    peaks=(Peak(hidden=2, ffn=5.5), *HUNYUAN_V1_DENSE.peaks[1:]),
    activation="xielu",
)
