"""One table per architecture; the key is ``config.model_type``."""

from __future__ import annotations

from frugal_bonsai.model.families.gpt2 import GPT2
from frugal_bonsai.model.families.llama import LLAMA

FAMILIES = {family.model_type: family for family in (LLAMA, GPT2)}
