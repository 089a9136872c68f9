"""What llama.cpp calls an architecture, and how its graph of it differs from transformers'.

In: nothing. Out: one table entry for each ``config.model_type`` that is exported. Written from
llama.cpp's conversion (convert_hf_to_gguf.py), loaders and graphs (src/models); names of tensors
and keys are the ``gguf`` package's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from frugal_bonsai.model.family_schema import Condition

PER_LAYER_ARCHITECTURE = "deci"
# llama.cpp's one gelu is the approximation by a tanh, of whichever gelu a config speaks.
GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp computes one of transformers' architectures.

    Attributes:
        name: of the GGUF architecture.
        as_llama: llama's graph computes the same, and ``deci``'s where layers differ in width.
        square: its loader wants as many rows of q as the model is wide, which a model with fewer
            heads has not.
        same_heads: it wants as many rows of k.
        fused: its tensors of q, k and v, or gate and up, in one -> what they are apart: for a model
            that is written as ``llama``.
        biases: tensors whose bias its loader takes, by llama.cpp's names.
        output: its loader wants the head's tensor, tied or not.
        activations: config's names of what its graph computes.
        layer_norm: its norms are LayerNorms; else RMSNorms.
        norm_epsilon: the config's key.
        norm_offset: what transformers adds to the weights of norms, and its graph does not.
        interleaved: its rotary embedding turns neighbouring dimensions; transformers' turns a
            dimension of a head's first half with one of its second half.
        rotates: all dimensions of a head (``whole``), any number of them (``part``) or none, for
            positions are learnt (``none``).
        rope_kinds: scalings of the rotary embedding that its graph has.
        pause: every so many layers one does without rotary embedding.
        window_period: every so many layers one has full attention, the others a sliding window; an
            entry without it has full attention alone.
        query_scalar: the config's key of what scores are divided by the square root of; its graph
            takes the width of a head.
        query_tensor: what is multiplied to make up for that.
        wide_layers: with as many layers its graph takes hidden size / heads instead.
        keys: methods of ``gguf.GGUFWriter`` -> keys of the config whose value they are given.
        refused: what a config may say that its graph does not compute; read from the config that
            transformers makes, defaults and all.
    """

    name: str
    as_llama: bool = False
    square: bool = False
    same_heads: bool = False
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    output: bool = False
    activations: tuple[str, ...] = ("silu",)
    layer_norm: bool = False
    norm_epsilon: str = "rms_norm_eps"
    norm_offset: float = 0.0
    interleaved: bool = False
    rotates: str = "whole"
    rope_kinds: tuple[str, ...] = ("linear",)
    pause: int | None = None
    window_period: int | None = None
    query_scalar: str | None = None
    query_tensor: str = "attn_q"
    wide_layers: int | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    refused: tuple[Condition, ...] = ()


_QKV = ("attn_q", "attn_k", "attn_v")
_GATED = ("ffn_gate", "ffn_up", "ffn_down")
LLAMA = Architecture(
    name="llama",
    as_llama=True,
    biases=(*_QKV, "attn_output", *_GATED),
    interleaved=True,
    rope_kinds=("linear", "llama3"),
)
_GEMMA2 = Architecture(
    name="gemma2",
    activations=GELU,
    norm_offset=1.0,
    window_period=2,
    query_scalar="query_pre_attn_scalar",
    wide_layers=46,
    keys={
        "add_attn_logit_softcapping": "attn_logit_softcapping",
        "add_final_logit_softcapping": "final_logit_softcapping",
    },
    refused=(
        Condition(key="attn_logit_softcapping", reason="always caps scores"),
        Condition(key="final_logit_softcapping", reason="always caps logits"),
        Condition(key="use_bidirectional_attention", value=True, reason="looks back alone"),
    ),
)
_GPT2 = Architecture(
    name="gpt2",
    square=True,
    biases=("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"),
    activations=GELU,
    layer_norm=True,
    norm_epsilon="layer_norm_epsilon",
    rotates="none",
    refused=(
        Condition(key="scale_attn_weights", value=False, reason="always scales scores"),
        Condition(
            key="scale_attn_by_inverse_layer_idx",
            value=True,
            reason="scales the scores of all layers alike",
        ),
    ),
)
_NORMED = "divides the weights of a token's experts by their sum"

# config.model_type -> architecture.
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": LLAMA,
        "mistral": LLAMA,
        "qwen2": Architecture(name="qwen2", as_llama=True, square=True, biases=_QKV),
        "qwen3": Architecture(name="qwen3"),
        "smollm3": Architecture(name="smollm3", biases=_QKV, interleaved=True, pause=4),
        "granite": replace(
            LLAMA,
            name="granite",
            as_llama=False,
            keys={
                "add_embedding_scale": "embedding_multiplier",
                "add_attention_scale": "attention_multiplier",
                "add_residual_scale": "residual_multiplier",
                "add_logit_scale": "logits_scaling",
            },
        ),
        "olmo2": Architecture(name="olmo2"),
        "stablelm": Architecture(
            name="stablelm",
            square=True,
            biases=("attn_norm", "ffn_norm", *_QKV),
            output=True,
            layer_norm=True,
            norm_epsilon="layer_norm_eps",
            rotates="part",
        ),
        "gemma2": _GEMMA2,
        "gemma3_text": replace(
            _GEMMA2,
            name="gemma3",
            window_period=6,
            query_tensor="attn_q_norm",
            wide_layers=62,
            keys={},
            refused=(
                Condition(
                    key="attn_logit_softcapping", other_than=0.0, reason="caps no scores any more"
                ),
                Condition(key="final_logit_softcapping", other_than=0.0, reason="caps no logits"),
                _GEMMA2.refused[-1],
            ),
        ),
        "phi3": Architecture(
            name="phi3",
            as_llama=True,
            square=True,
            fused={
                "qkv_proj": ("q_proj", "k_proj", "v_proj"),
                "gate_up_proj": ("gate_proj", "up_proj"),
            },
            rotates="part",
            rope_kinds=("linear", "longrope"),
        ),
        "gpt2": _GPT2,
        "gpt_neox": replace(
            _GPT2,
            name="gptneox",
            output=True,
            norm_epsilon="layer_norm_eps",
            rotates="part",
            keys={"add_parallel_residual": "use_parallel_residual"},
            refused=(
                Condition(
                    key="attention_bias", value=False, reason="wants biases at q, k, v and output"
                ),
            ),
        ),
        "falcon": Architecture(
            name="falcon",
            square=True,
            biases=("attn_norm", "attn_norm_2"),
            activations=GELU,
            layer_norm=True,
            norm_epsilon="layer_norm_epsilon",
            refused=(
                Condition(
                    key="parallel_attn",
                    value=False,
                    reason="computes attention and FFN side by side",
                ),
            ),
        ),
        "mixtral": replace(LLAMA, as_llama=False, biases=()),
        "qwen3_moe": Architecture(
            name="qwen3moe",
            refused=(Condition(key="norm_topk_prob", value=False, reason=_NORMED),),
        ),
        "olmoe": Architecture(
            name="olmoe",
            square=True,
            same_heads=True,
            output=True,
            refused=(
                Condition(
                    key="norm_topk_prob", value=True, reason="leaves the weights of experts alone"
                ),
                Condition(key="clip_qkv", other_than=0.0, reason="clips no q, k and v"),
            ),
        ),
    }
)
