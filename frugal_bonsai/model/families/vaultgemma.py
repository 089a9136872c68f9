"""VaultGemma: Gemma 2 without norms behind the sublayers."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.gemma2 import GEMMA2

VAULTGEMMA = replace(
    GEMMA2, model_type="vaultgemma", models="VaultGemma", attention_norm=None, ffn_norm=None
)
