"""The tables of all supported architectures, by ``config.model_type``."""

from __future__ import annotations

from dataclasses import replace

from frugal_bonsai.model.families.apertus import APERTUS
from frugal_bonsai.model.families.arcee import ARCEE
from frugal_bonsai.model.families.bamba import BAMBA
from frugal_bonsai.model.families.cohere import COHERE
from frugal_bonsai.model.families.cohere2 import COHERE2
from frugal_bonsai.model.families.deepseek_v2 import DEEPSEEK_V2
from frugal_bonsai.model.families.deepseek_v3 import DEEPSEEK_V3
from frugal_bonsai.model.families.dots1 import DOTS1
from frugal_bonsai.model.families.ernie4_5 import ERNIE4_5
from frugal_bonsai.model.families.ernie4_5_moe import ERNIE4_5_MOE, ERNIE4_5_MOE_ROUTED
from frugal_bonsai.model.families.exaone4 import EXAONE4
from frugal_bonsai.model.families.exaone_moe import EXAONE_MOE
from frugal_bonsai.model.families.falcon import FALCON
from frugal_bonsai.model.families.flex_olmo import FLEX_OLMO
from frugal_bonsai.model.families.gemma import GEMMA
from frugal_bonsai.model.families.gemma2 import GEMMA2
from frugal_bonsai.model.families.gemma3 import GEMMA3
from frugal_bonsai.model.families.gemma4 import GEMMA4
from frugal_bonsai.model.families.gemma4_experts import GEMMA4_EXPERTS
from frugal_bonsai.model.families.glm import GLM
from frugal_bonsai.model.families.glm4 import GLM4
from frugal_bonsai.model.families.glm4_moe import GLM4_MOE
from frugal_bonsai.model.families.glm4_moe_lite import GLM4_MOE_LITE
from frugal_bonsai.model.families.gpt2 import GPT2
from frugal_bonsai.model.families.gpt_neo import GPT_NEO
from frugal_bonsai.model.families.gpt_neox import GPT_NEOX
from frugal_bonsai.model.families.gpt_oss import GPT_OSS
from frugal_bonsai.model.families.granite import GRANITE
from frugal_bonsai.model.families.granitemoe import GRANITEMOE
from frugal_bonsai.model.families.granitemoehybrid import GRANITEMOEHYBRID
from frugal_bonsai.model.families.granitemoehybrid_experts import GRANITEMOEHYBRID_EXPERTS
from frugal_bonsai.model.families.granitemoeshared import GRANITEMOESHARED
from frugal_bonsai.model.families.helium import HELIUM
from frugal_bonsai.model.families.hunyuan_v1_dense import HUNYUAN_V1_DENSE
from frugal_bonsai.model.families.lfm2 import LFM2
from frugal_bonsai.model.families.lfm2_moe import LFM2_MOE
from frugal_bonsai.model.families.llama import LLAMA
from frugal_bonsai.model.families.llama4 import LLAMA4
from frugal_bonsai.model.families.mellum import MELLUM
from frugal_bonsai.model.families.minimax_m2 import MINIMAX_M2
from frugal_bonsai.model.families.ministral import MINISTRAL
from frugal_bonsai.model.families.ministral3 import MINISTRAL3
from frugal_bonsai.model.families.mistral import MISTRAL
from frugal_bonsai.model.families.mixtral import MIXTRAL
from frugal_bonsai.model.families.nemotron import NEMOTRON
from frugal_bonsai.model.families.olmo2 import OLMO2
from frugal_bonsai.model.families.olmo3 import OLMO3
from frugal_bonsai.model.families.olmoe import OLMOE
from frugal_bonsai.model.families.opt import OPT
from frugal_bonsai.model.families.phi3 import PHI3
from frugal_bonsai.model.families.qwen2 import QWEN2
from frugal_bonsai.model.families.qwen2_moe import QWEN2_MOE
from frugal_bonsai.model.families.qwen3 import QWEN3
from frugal_bonsai.model.families.qwen3_5 import QWEN3_5
from frugal_bonsai.model.families.qwen3_5_moe import QWEN3_5_MOE
from frugal_bonsai.model.families.qwen3_moe import QWEN3_MOE
from frugal_bonsai.model.families.qwen3_next import QWEN3_NEXT
from frugal_bonsai.model.families.seed_oss import SEED_OSS
from frugal_bonsai.model.families.smollm3 import SMOLLM3
from frugal_bonsai.model.families.solar_open import SOLAR_OPEN
from frugal_bonsai.model.families.stablelm import STABLELM
from frugal_bonsai.model.families.starcoder2 import STARCODER2
from frugal_bonsai.model.families.vaultgemma import VAULTGEMMA
from frugal_bonsai.model.families.youtu import YOUTU
from frugal_bonsai.model.family_schema import Condition

_TABLES = (
    LLAMA,
    MISTRAL,
    MINISTRAL,
    MINISTRAL3,
    QWEN2,
    QWEN3,
    QWEN3_5,
    SMOLLM3,
    GRANITE,
    GRANITEMOEHYBRID,
    OLMO2,
    OLMO3,
    STABLELM,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GEMMA4,
    VAULTGEMMA,
    PHI3,
    GLM,
    GLM4,
    EXAONE4,
    ERNIE4_5,
    HUNYUAN_V1_DENSE,
    SEED_OSS,
    LFM2,
    BAMBA,
    YOUTU,
    HELIUM,
    COHERE,
    COHERE2,
    ARCEE,
    NEMOTRON,
    APERTUS,
    STARCODER2,
    GPT2,
    GPT_NEO,
    GPT_NEOX,
    OPT,
    FALCON,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    QWEN3_NEXT,
    QWEN3_5_MOE,
    MELLUM,
    OLMOE,
    FLEX_OLMO,
    MINIMAX_M2,
    GRANITEMOE,
    GRANITEMOESHARED,
    LFM2_MOE,
    GPT_OSS,
    LLAMA4,
    DEEPSEEK_V3,
    GLM4_MOE,
    GLM4_MOE_LITE,
    DOTS1,
    EXAONE_MOE,
    SOLAR_OPEN,
    DEEPSEEK_V2,
    ERNIE4_5_MOE,
)
FAMILIES = {family.model_type: family for family in _TABLES}
# Another table for some configs of an architecture: the first whose condition holds.
VARIANTS = {
    "granitemoehybrid": (
        (Condition(key="num_local_experts", other_than=0, default=8), GRANITEMOEHYBRID_EXPERTS),
    ),
    "gemma4_text": ((Condition(key="enable_moe_block", value=True), GEMMA4_EXPERTS),),
    "ernie4_5_moe": (
        (Condition(key="moe_num_shared_experts", value=0, default=2), ERNIE4_5_MOE_ROUTED),
    ),
}
# Text models inside models of several modalities that compute the same as a family as long as all
# tokens are text. Those of Qwen2-VL compute the width of a head from the number of heads.
TEXT_MODELS = {
    "qwen2_vl_text": replace(QWEN2, head_dim_key=None),
    "qwen2_5_vl_text": replace(QWEN2, head_dim_key=None),
    "qwen3_vl_text": QWEN3,
}
# Models of images and text that compute the same as their text model as long as all tokens are
# text. Others may attend differently: PaliGemma's prompts attend in both directions.
WHOLES = (
    *(
        "gemma3",
        "gemma4",
        "got_ocr2",
        "idefics3",
        "internvl",
        "llava",
        "llava_next",
        "llava_onevision",
    ),
    *("llama4", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl", "smolvlm"),
)
