"""Table of llama.cpp's architectures, and how their graphs differ from transformers' models.

In: nothing. Out: one entry for each ``config.model_type`` that can be exported. Entries follow
llama.cpp's conversion (convert_hf_to_gguf.py), loaders and graphs (src/models). Names of tensors
and keys are the ``gguf`` package's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

PER_LAYER_ARCHITECTURE = "deci"
# llama.cpp computes every gelu by the approximation with a tanh.
GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu")
_RMS_NORM = {"add_layer_norm_rms_eps": "rms_norm_eps"}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp computes one of transformers' architectures.

    Attributes:
        name: Of the GGUF architecture.
        as_llama: Entry for llama's graph where it computes the same function. So does ``deci``'s,
            which takes layers of different widths.
        fixed_rows: Projections of which the loader wants as many rows as the model is wide. A model
            with fewer heads does not load.
        fused: Tensor of q, k and v, or of gate and up -> the tensors that the graph reads instead.
        biases: Tensors that may have a bias in a layer, by llama.cpp's names.
        output: The loader wants the tensor of the head even where it is tied.
        activations: The config's names of what the graph computes.
        keys: Methods of ``gguf.GGUFWriter`` -> keys of the config whose values they write.
        norm_offset: transformers adds it to the weights of norms, the graph does not.
        interleaved: The graph rotates neighbouring dimensions of a head. transformers rotates a
            dimension of the first half with one of the second half.
        rotates: Dimensions of a head that the graph can rotate: all (``whole``), any number
            (``part``) or none (``none``: positions are learnt).
        rope_kinds: Scalings of the rotary embedding that the graph has.
        pause: Every layer whose number is a multiple of this has no rotary embedding.
        window_period: Every layer whose number is a multiple of this has full attention, the others
            a sliding window. None: the graph has full attention only.
        query_scalar: The config's key of the number whose square root divides the scores. The graph
            takes the width of a head.
        query_tensor: The tensor that is scaled to make up for that.
        wide_layers: With this number of layers, the graph takes hidden size / heads instead.
        switches: Keys of the config that switch a part of the model on -> whether the graph has
            that part. The graph ignores what the config says.
    """

    name: str
    as_llama: Architecture | None = None
    fixed_rows: tuple[str, ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    output: bool = False
    activations: tuple[str, ...] = ("silu",)
    keys: Mapping[str, str] = field(default_factory=lambda: _RMS_NORM)
    norm_offset: float = 0.0
    interleaved: bool = False
    rotates: str = "whole"
    rope_kinds: tuple[str, ...] = ("linear",)
    pause: int | None = None
    window_period: int | None = None
    query_scalar: str | None = None
    query_tensor: str = "attn_q"
    wide_layers: int | None = None
    switches: Mapping[str, bool] = field(default_factory=dict)


_Q = ("attn_q",)
_QKV = ("attn_q", "attn_k", "attn_v")
_GATED = ("ffn_gate", "ffn_up", "ffn_down")
_LLAMA = Architecture(
    name="llama",
    biases=(*_QKV, "attn_output", *_GATED),
    interleaved=True,
    rope_kinds=("linear", "llama3"),
)
_GRANITE = replace(
    _LLAMA,
    name="granite",
    keys={
        **_RMS_NORM,
        "add_embedding_scale": "embedding_multiplier",
        "add_attention_scale": "attention_multiplier",
        "add_residual_scale": "residual_multiplier",
        "add_logit_scale": "logits_scaling",
    },
)
_GEMMA2 = Architecture(
    name="gemma2",
    activations=GELU,
    norm_offset=1.0,
    window_period=2,
    query_scalar="query_pre_attn_scalar",
    wide_layers=46,
    keys={
        **_RMS_NORM,
        "add_attn_logit_softcapping": "attn_logit_softcapping",
        "add_final_logit_softcapping": "final_logit_softcapping",
    },
    switches={
        "attn_logit_softcapping": True,
        "final_logit_softcapping": True,
        "use_bidirectional_attention": False,
    },
)
_GPT2 = Architecture(
    name="gpt2",
    fixed_rows=_Q,
    biases=("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"),
    activations=GELU,
    keys={"add_layer_norm_eps": "layer_norm_epsilon"},
    rotates="none",
    switches={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
)

# config.model_type -> architecture.
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": replace(_LLAMA, as_llama=_LLAMA),
        "mistral": replace(_LLAMA, as_llama=_LLAMA),
        "qwen2": Architecture(name="qwen2", as_llama=_LLAMA, fixed_rows=_Q, biases=_QKV),
        "qwen3": Architecture(name="qwen3"),
        "smollm3": Architecture(name="smollm3", biases=_QKV, interleaved=True, pause=4),
        "granite": _GRANITE,
        "olmo2": Architecture(name="olmo2"),
        "stablelm": Architecture(
            name="stablelm",
            fixed_rows=_Q,
            biases=("attn_norm", "ffn_norm", *_QKV),
            output=True,
            keys={"add_layer_norm_eps": "layer_norm_eps"},
            rotates="part",
        ),
        "gemma2": _GEMMA2,
        "gemma3_text": replace(
            _GEMMA2,
            name="gemma3",
            window_period=6,
            query_tensor="attn_q_norm",
            wide_layers=62,
            keys=_RMS_NORM,
            switches=dict.fromkeys(_GEMMA2.switches, False),
        ),
        "phi3": Architecture(
            name="phi3",
            as_llama=replace(
                _LLAMA,
                fused={
                    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
                    "gate_up_proj": ("gate_proj", "up_proj"),
                },
            ),
            fixed_rows=_Q,
            rotates="part",
            rope_kinds=("linear", "longrope"),
        ),
        "gpt2": _GPT2,
        "gpt_neox": replace(
            _GPT2,
            name="gptneox",
            output=True,
            rotates="part",
            keys={
                "add_layer_norm_eps": "layer_norm_eps",
                "add_parallel_residual": "use_parallel_residual",
            },
            switches={"attention_bias": True},
        ),
        "falcon": Architecture(
            name="falcon",
            fixed_rows=_Q,
            biases=("attn_norm", "attn_norm_2"),
            activations=GELU,
            keys={"add_layer_norm_eps": "layer_norm_epsilon"},
            switches={"parallel_attn": True},
        ),
        "gemma": Architecture(
            name="gemma",
            activations=GELU,
            norm_offset=1.0,
            switches={"use_bidirectional_attention": False},
        ),
        "seed_oss": Architecture(name="seed_oss", biases=_QKV),
        "arcee": Architecture(name="arcee", activations=("relu2",), interleaved=True),
        "starcoder2": Architecture(
            name="starcoder2",
            fixed_rows=_Q,
            biases=(*_GPT2.biases, *_QKV),
            activations=GELU,
            keys={"add_layer_norm_eps": "norm_epsilon"},
        ),
        "nemotron": Architecture(
            name="nemotron",
            fixed_rows=_Q,
            biases=("attn_norm", "ffn_norm"),
            activations=("relu2",),
            keys={"add_layer_norm_eps": "norm_eps"},
            norm_offset=1.0,
            rotates="part",
        ),
        # transformers rotates neighbouring dimensions here, too.
        "ernie4_5": Architecture(name="ernie4_5"),
        "glm4": Architecture(name="glm4", biases=_QKV, rotates="part"),
        "glm": Architecture(name="chatglm", fixed_rows=_Q, biases=_QKV, rotates="part"),
        "cohere": Architecture(
            name="command-r",
            keys={"add_layer_norm_eps": "layer_norm_eps", "add_logit_scale": "logit_scale"},
            switches={"use_qk_norm": False},
        ),
        "cohere2": Architecture(
            name="cohere2",
            biases=_QKV,
            keys={"add_layer_norm_eps": "layer_norm_eps", "add_logit_scale": "logit_scale"},
            window_period=4,
        ),
        # With sliding windows (32B) the graph depends on the number of layers.
        "exaone4": Architecture(name="exaone4", fixed_rows=_Q),
        "hunyuan_v1_dense": Architecture(name="hunyuan-dense"),
        "mixtral": replace(_LLAMA, biases=()),
        "qwen3_moe": Architecture(name="qwen3moe", switches={"norm_topk_prob": True}),
        "granitemoe": replace(_GRANITE, name="granitemoe", biases=()),
        "olmoe": Architecture(
            name="olmoe",
            fixed_rows=("attn_q", "attn_k"),
            output=True,
            switches={"norm_topk_prob": False, "clip_qkv": False},
        ),
    }
)

# config.model_type -> llama.cpp's architecture, for families that its own conversion takes.
CONVERTED_ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "apertus": "apertus",
        "deepseek_v2": "deepseek2",
        "deepseek_v3": "deepseek2",
        "dots1": "dots1",
        "ernie4_5_moe": "ernie4_5-moe",
        "exaone_moe": "exaone-moe",
        "gemma4_text": "gemma4",
        "glm4_moe": "glm4moe",
        "glm4_moe_lite": "deepseek2",
        "gpt_oss": "gpt-oss",
        "granitemoehybrid": "granitehybrid",
        "granitemoeshared": "granitemoe",
        "lfm2": "lfm2",
        "lfm2_moe": "lfm2moe",
        "llama4_text": "llama4",
        "minimax_m2": "minimax-m2",
        "ministral3": "mistral3",
        "olmo3": "olmo2",
        "qwen2_moe": "qwen2moe",
        "qwen3_5_moe_text": "qwen35moe",
        "qwen3_5_text": "qwen35",
        "qwen3_next": "qwen3next",
    }
)
