"""Mixtral: Mistral with experts as FFNs, two per token."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.expert_schema import Experts
from frugal_bonsai.model.families.mistral import MISTRAL
from frugal_bonsai.model.family_schema import GATED_PEAKS, Part, Peak

# Names of an expert's projections in older checkpoints, which transformers writes, too.
_STORED = {
    ".mlp.": ".block_sparse_moe.",
    ".gate_proj.": ".w1.",
    ".down_proj.": ".w2.",
    ".up_proj.": ".w3.",
}

EXPERT_PARTS = (
    Part(tensor="mlp.experts.{expert}.gate_proj.weight"),
    Part(tensor="mlp.experts.{expert}.up_proj.weight"),
    Part(tensor="mlp.experts.{expert}.down_proj.weight", axis=1),
)
EXPERT_OUTPUT = "mlp.experts.{expert}.down_proj"
# All tokens of a micro-batch may go to the same expert. The layer then holds the expert's input and
# output beside the residual stream; while the expert is masked, it holds its input for all tokens.
EXPERT_PEAKS = (Peak(hidden=5, ffn=3), Peak(hidden=6, ffn=2), *GATED_PEAKS[1:])

MIXTRAL = replace(
    MISTRAL,
    model_type="mixtral",
    models="Mixtral",
    stored_parts=_STORED,
    ffn_parts=EXPERT_PARTS,
    ffn_output=EXPERT_OUTPUT,
    experts=Experts(chosen_default=2),
    peaks=EXPERT_PEAKS,
)
