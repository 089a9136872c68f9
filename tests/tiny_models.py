"""Tiny random models on disk, and Hugging Face's own model as the oracle.

Every parameter is random, norms and biases too, so that nothing is right by being zero or one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.memory.plan import SweepLimits
from frugal_bonsai.model.canonical_names import describe_checkpoint
from frugal_bonsai.model.cut import slices_by_tensor
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.stream.engine import FLOAT, Engine
from frugal_bonsai.stream.source import CheckpointSource

CPU = torch.device("cpu")

# hidden 24 is divisible by the query heads of one, two and three KV groups: all are legal counts.
TINY: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GQA: dict[str, Any] = {}
MHA: dict[str, Any] = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}
TIED: dict[str, Any] = {"tie_word_embeddings": True}
BIASES: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa-untied": GQA,
    "gqa-tied": TIED,
    "mha-untied": MHA,
    "mha-tied-biases": {**MHA, **TIED, **BIASES},
    "gqa-biases": BIASES,
}


@dataclass(frozen=True)
class Tiny:
    """A model on disk, open."""

    folder: Path
    checkpoint: Checkpoint
    spec: ModelSpec

    def engine(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        arithmetic: str = FLOAT,
        progress: Any = None,
        device: torch.device = CPU,
        **limits: int,
    ) -> Engine:
        return Engine(
            self.checkpoint,
            self.spec,
            device=device,
            dtype=dtype,
            limits=sweep_limits(**limits),
            arithmetic=arithmetic,
            progress=progress,
        )

    def source(self, **options: Any) -> CheckpointSource:
        return CheckpointSource(self.checkpoint, self.spec, **options)

    def hugging_face(self, mask: KeepMask | None = None) -> PreTrainedModel:
        """The model in fp32; with a mask, all weights of the removed units are zero."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32
        ).eval()
        if mask is not None:
            zero_units(model, self.spec, mask)
        return model


def sweep_limits(**limits: int) -> SweepLimits:
    values = {
        "micro_batch": 4,
        "windows_in_flight": 1000,
        "resident_windows": 0,
        "head_rows": 1000,
        "head_tokens": 1000,
    }
    return SweepLimits(**{**values, **limits})


def tiny_llama(folder: Path, **changes: Any) -> Tiny:
    """Save a random Llama into a new folder and open it; see :func:`tiny_model`."""
    return tiny_model(folder, "llama", **{**TINY, **changes})


def tiny_model(folder: Path, model_type: str, **changes: Any) -> Tiny:
    """Save a random model of an architecture into a new folder and open it."""
    save_tiny(folder, model_type, **changes)
    return open_tiny(folder)


def save_tiny(
    folder: Path,
    model_type: str,
    *,
    seed: int = 0,
    std: float = 0.3,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> None:
    """Save a random model of an architecture into a new folder."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=std, generator=generator)
            # Gemma's norms multiply by one and their weight.
            offset = model_type.startswith("gemma") and not model_type.startswith("gemma4")
            if ("norm" in name or ".ln_" in name) and not offset:
                parameter.add_(1.0)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.normal_(std=std, generator=generator)
            elif name.endswith("layer_scalar"):
                buffer.normal_(mean=1.0, std=std, generator=generator)
    model.to(dtype).save_pretrained(folder)


def save_byte_tokenizer(folder: Path) -> None:
    """Every byte is a token."""
    alphabet = {piece: at for at, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def save_pair_tokenizer(folder: Path, vocabulary: int = 512) -> None:
    """Byte-level BPE of ASCII letters and pairs of them: no token is a part of a character."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    special = ["<pad>", "<bos>", "<eos>"]
    pairs = [(a, b) for a in letters for b in letters][: vocabulary - len(special) - len(letters)]
    tokens = [*special, *letters, *("".join(pair) for pair in pairs)]
    tokenizer = Tokenizer(models.BPE(vocab={t: at for at, t in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def logits_like(folder: Path, *, assume: str) -> float:
    """How far the streamed logits of an assumed family are from Hugging Face's."""
    checkpoint = Checkpoint.open(folder)
    tiny = Tiny(folder, checkpoint, describe_checkpoint(checkpoint, assume=assume))
    tokens_NS, engine = random_windows(2, 9), tiny.engine()
    with engine.native() as stream, torch.inference_mode():
        hidden = engine.sweep.run(stream, tokens_NS)
        found = engine.head.logits(hidden.read(slice(0, 2)))
        return relative(found, tiny.hugging_face()(tokens_NS).logits)


# A two-layer model of every family in the table: its own config class, counts that all differ.
_SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def _without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


# Four of the widths that Qwen3.5 has for its linear attention.
_LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 7,
    "partial_rotary_factor": 0.5,
}
# Of four experts a token has two; all tokens have the shared one, too.
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
}
_GPT2: dict[str, Any] = {
    "vocab_size": 53,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_inner": 20,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Latent attention: of a head, 4 are rotated and 5 are not. The first layer has no experts.
_SHARED: dict[str, Any] = {
    "intermediate_size": 28,
    "moe_intermediate_size": 20,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
_ERNIE: dict[str, Any] = {
    "intermediate_size": 28,
    "moe_intermediate_size": 20,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 6,
    "q_lora_rank": 7,
    "kv_lora_rank": 9,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 5,
    "v_head_dim": 3,
}
# Layers of full attention have wider heads, whose values are the keys.
_GEMMA4: dict[str, Any] = {
    **_SIZES,
    "tie_word_embeddings": True,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
    "global_head_dim": 8,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
}
# Test name -> model_type and config.
FAMILY_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SIZES),
    # Windows of 13 tokens are longer than the sliding windows.
    "mistral": ("mistral", {**_SIZES, "sliding_window": 5}),
    "qwen2": (
        "qwen2",
        {**_SIZES, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", _SIZES),
    "qwen3_5": (
        "qwen3_5_text",
        {**_SIZES, **_LINEAR},
    ),
    "qwen3-biases": ("qwen3", {**_SIZES, "attention_bias": True, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {**_SIZES, "no_rope_layers": [1, 0]}),
    # Positions 8 to 12 are beyond the original length, so their queries grow.
    "ministral3": (
        "ministral3",
        {
            **_SIZES,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 8.0,
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
    "ministral": (
        "ministral",
        {
            **_SIZES,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "granite": (
        "granite",
        {
            **_SIZES,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 8.0,
            "attention_bias": True,
        },
    ),
    "granite4": (
        "granitemoehybrid",
        {
            **_SIZES,
            "layers_block_type": ["mamba", "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 20,
            "mamba_n_heads": 4,
            "mamba_d_head": 12,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "granite4-experts": (
        "granitemoehybrid",
        {
            **_SIZES,
            "layers_block_type": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 9,
            "mamba_n_heads": 4,
            "mamba_d_head": 12,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "olmo2": ("olmo2", _SIZES),
    "olmo3": (
        "olmo3",
        {
            **_SIZES,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "glm": ("glm", _SIZES),
    "glm4": ("glm4", {**_SIZES, "attention_bias": True}),
    "exaone4": (
        "exaone4",
        {
            **_SIZES,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "ernie4_5": ("ernie4_5", {**_SIZES, "tie_word_embeddings": True}),
    "ernie4_5-biases": ("ernie4_5", {**_SIZES, "use_bias": True}),
    "hunyuan": ("hunyuan_v1_dense", _SIZES),
    # Its FFN has 8 * ceil(2/3 * 36 * 0.8 / 8) = 24 channels.
    "lfm2": (
        "lfm2",
        {
            **_without(_SIZES, "head_dim"),
            "layer_types": ["conv", "full_attention"],
            "intermediate_size": 36,
            "block_ffn_dim_multiplier": 0.8,
            "block_multiple_of": 8,
        },
    ),
    "seed-oss": ("seed_oss", {**_SIZES, "attention_bias": True}),
    "helium": ("helium", _SIZES),
    "cohere": ("cohere", {**_SIZES, "logit_scale": 0.3}),
    "cohere-norms": ("cohere", {**_SIZES, "use_qk_norm": True, "tie_word_embeddings": True}),
    "cohere2": (
        "cohere2",
        {
            **_SIZES,
            "logit_scale": 0.3,
            "attention_bias": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "apertus": ("apertus", _SIZES),
    "arcee": ("arcee", {**_SIZES, "mlp_bias": True}),
    "nemotron": ("nemotron", {**_SIZES, "partial_rotary_factor": 0.5}),
    "starcoder2": ("starcoder2", {**_SIZES, "sliding_window": 5}),
    "gemma": ("gemma", {**_SIZES, "tie_word_embeddings": True}),
    "stablelm": ("stablelm", {**_SIZES, "partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "stablelm-parallel": (
        "stablelm",
        {
            **_SIZES,
            "partial_rotary_factor": 0.5,
            "use_parallel_residual": True,
            "qk_layernorm": True,
        },
    ),
    "gemma2": (
        "gemma2",
        {
            **_SIZES,
            "tie_word_embeddings": True,
            "sliding_window": 5,
            "query_pre_attn_scalar": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **_SIZES,
            "tie_word_embeddings": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 6,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            **_GEMMA4,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma4-experts": (
        "gemma4_text",
        {
            **_GEMMA4,
            "enable_moe_block": True,
            "intermediate_size": 28,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 20,
        },
    ),
    "vaultgemma": (
        "vaultgemma",
        {
            **_SIZES,
            "tie_word_embeddings": True,
            "sliding_window": 5,
            "query_pre_attn_scalar": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi3": ("phi3", {**_SIZES, "sliding_window": 5, "partial_rotary_factor": 0.5}),
    "gpt2": ("gpt2", _GPT2),
    "gpt2-untied": ("gpt2", {**_GPT2, "tie_word_embeddings": False, "n_inner": None}),
    "gpt-neo": (
        "gpt_neo",
        {
            "vocab_size": 53,
            "hidden_size": 24,
            "num_layers": 2,
            "num_heads": 3,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
            "intermediate_size": 20,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "pythia": ("gpt_neox", _without(_SIZES, "head_dim", "num_key_value_heads")),
    "gpt-neox-sequential": (
        "gpt_neox",
        {
            **_without(_SIZES, "head_dim", "num_key_value_heads"),
            "use_parallel_residual": False,
            "attention_bias": False,
        },
    ),
    "opt": (
        "opt",
        {
            **_without(_SIZES, "head_dim", "num_key_value_heads", "intermediate_size"),
            "ffn_dim": 20,
            "word_embed_proj_dim": 24,
            "tie_word_embeddings": True,
        },
    ),
    # Of four experts a token has two; Qwen3-MoE's weights of the two are made to add up to one.
    "mixtral": ("mixtral", {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "qwen3_moe",
        {**_SIZES, **_EXPERTS},
    ),
    "qwen2-moe": ("qwen2_moe", {**_SIZES, **_EXPERTS, "shared_expert_intermediate_size": 9}),
    "qwen3-next": (
        "qwen3_next",
        {**_SIZES, **_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 9},
    ),
    "qwen3_5-moe": (
        "qwen3_5_moe_text",
        {**_SIZES, **_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 9},
    ),
    "mellum": (
        "mellum",
        {
            **_SIZES,
            **_EXPERTS,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "mlp_layer_types": ["sparse", "sparse"],
        },
    ),
    "minimax-m2": ("minimax_m2", {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": (
        "granitemoe",
        {
            **_SIZES,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 8.0,
        },
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {**_without(_SIZES, "head_dim"), **_SHARED, **_LATENT},
    ),
    # A token's experts come from one of two groups. The seed has no token near a tie of groups,
    # which the rounding of a refit would send to other experts.
    "deepseek-v3-groups": (
        "deepseek_v3",
        {
            **_without(_SIZES, "head_dim"),
            **_SHARED,
            **_LATENT,
            **{"n_routed_experts": 8, "n_group": 2, "seed": 3},
        },
    ),
    # Chunks of 5 tokens, and no rotary embedding in the layer with experts.
    "llama4": (
        "llama4_text",
        {
            **_SIZES,
            "intermediate_size_mlp": 28,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_layers": [1],
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 5,
            "floor_scale": 4,
        },
    ),
    "glm4-moe": ("glm4_moe", {**_SIZES, **_SHARED, "use_qk_norm": True}),
    "glm4-moe-lite": (
        "glm4_moe_lite",
        {**_without(_SIZES, "head_dim"), **_without(_SHARED, "first_k_dense_replace"), **_LATENT},
    ),
    "dots1": (
        "dots1",
        {
            **_SIZES,
            **_SHARED,
            "num_experts_per_tok": 3,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "exaone-moe": (
        "exaone_moe",
        {
            **_SIZES,
            **_without(_SHARED, "n_routed_experts", "n_shared_experts", "first_k_dense_replace"),
            "num_experts": 4,
            "num_shared_experts": 1,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "deepseek-v2": (
        "deepseek_v2",
        {
            **_without(_SIZES, "head_dim"),
            **_without(_SHARED, "n_group", "topk_group", "num_nextn_predict_layers"),
            **_LATENT,
            **{"qk_nope_head_dim": 6, "kv_lora_rank": 10},  # pairs are rotated as complex numbers
        },
    ),
    "deepseek-v2-groups": (
        "deepseek_v2",
        {
            **_without(_SIZES, "head_dim"),
            **_without(_SHARED, "num_nextn_predict_layers"),
            **_LATENT,
            **{"qk_nope_head_dim": 6, "kv_lora_rank": 10},
            **{"n_routed_experts": 8, "n_group": 2, "topk_method": "group_limited_greedy"},
        },
    ),
    "ernie4_5-moe": (
        "ernie4_5_moe",
        {
            **_SIZES,
            **_ERNIE,
        },
    ),
    "ernie4_5-moe-routed": (
        "ernie4_5_moe",
        {
            **_SIZES,
            **_ERNIE,
            "moe_num_shared_experts": 0,
        },
    ),
    "bamba": (
        "bamba",
        {
            **_without(_SIZES, "head_dim"),
            "attn_layer_indices": [1],
            "mamba_n_heads": 4,
            "mamba_d_head": 12,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    "youtu": ("youtu", {**_without(_SIZES, "head_dim"), **_LATENT}),
    "granitemoeshared": (
        "granitemoeshared",
        {
            **_SIZES,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 9,
            "residual_multiplier": 0.22,
        },
    ),
    "lfm2-moe": (
        "lfm2_moe",
        {
            **_without(_SIZES, "head_dim"),
            **_EXPERTS,
            "layer_types": ["conv", "full_attention"],
            "intermediate_size": 28,
            "num_dense_layers": 1,
        },
    ),
    "solar-open": (
        "solar_open",
        {**_SIZES, **_without(_SHARED, "first_k_dense_replace", "intermediate_size")},
    ),
    # Its gates reach the limit.
    "flex-olmo": ("flex_olmo", {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": (
        "gpt_oss",
        {
            **_SIZES,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "swiglu_limit": 1.0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "olmoe": ("olmoe", {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 1.0}),
    # 7B's wiring: one KV head, one norm for both sublayers; 40B's: groups and two norms.
    "falcon-multi-query": (
        "falcon",
        {**_without(_SIZES, "head_dim", "num_key_value_heads"), "ffn_hidden_size": 20},
    ),
    "falcon-groups": (
        "falcon",
        {
            **_without(_SIZES, "head_dim", "num_key_value_heads"),
            "ffn_hidden_size": 20,
            "new_decoder_architecture": True,
            "num_kv_heads": 3,
            "bias": True,
        },
    ),
    "falcon-sequential": (
        "falcon",
        {
            **_without(_SIZES, "head_dim", "num_key_value_heads"),
            "ffn_hidden_size": 20,
            "multi_query": False,
            "parallel_attn": False,
        },
    ),
}


# One of every structural kind, which test_families_prune.py prunes end to end: norms behind the
# projection and soft-capping; parallel residuals; multipliers; a fused gate; an FFN without a
# module; interleaved groups and a tuple; norms over all heads; positions of its own; experts.
PRUNED = (
    "gemma2",
    "pythia",
    "granite",
    "phi3",
    "opt",
    "falcon-groups",
    "olmo2",
    "gpt-neo",
    "qwen3-moe",
)
# Pruned end to end by test_experts_command.py.
EXPERTS_PRUNED = ("mixtral", "qwen3-moe", "olmoe")
# Whose experts keep their channels: test_shared_experts_command.py drops whole ones.
WHOLE_EXPERTS_PRUNED = (
    *("deepseek-v3", "glm4-moe", "glm4-moe-lite", "dots1"),
    *("exaone-moe", "deepseek-v2", "llama4", "ernie4_5-moe", "solar-open"),
)


def _first_of_each_other_family() -> tuple[str, ...]:
    """Return a tiny model of each family without one in the lists above."""
    pruned = {FAMILY_CONFIGS[name][0] for name in (*PRUNED, *EXPERTS_PRUNED, *WHOLE_EXPERTS_PRUNED)}
    first: dict[str, str] = {}
    for name, (model_type, _) in FAMILY_CONFIGS.items():
        if model_type not in pruned:
            first.setdefault(model_type, name)
    return tuple(first.values())


# Pruned end to end, too, in one round with few windows.
PRUNED_BRIEFLY = _first_of_each_other_family()


def tiny_family(folder: Path, name: str, **changes: Any) -> Tiny:
    """A two-layer model of a family; see :data:`FAMILY_CONFIGS`."""
    model_type, config = FAMILY_CONFIGS[name]
    return tiny_model(folder, model_type, **{**config, **changes})


def open_tiny(folder: Path) -> Tiny:
    checkpoint = Checkpoint.open(folder)
    return Tiny(folder, checkpoint, describe_checkpoint(checkpoint))


def zero_units(model: PreTrainedModel, spec: ModelSpec, mask: KeepMask) -> None:
    """Zero every row and column that the removed units own (biases of rows too)."""
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for name, pieces in slices_by_tensor(spec.table).items():
            for group, piece in pieces:
                gone = (~mask.of(group)).repeat_interleave(piece.width).nonzero().flatten()
                turned = name.endswith(spec.family.transposed)
                axis = 1 - piece.axis if turned else piece.axis
                tensors[name].index_fill_(axis, gone + piece.start, 0.0)


def random_windows(
    windows: int, window: int, *, seed: int = 0, vocabulary: int = 53
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (windows, window), generator=generator)


@torch.no_grad()
def sampled_windows(
    model: PreTrainedModel, windows: int, window: int, *, seed: int = 0
) -> torch.Tensor:
    """Windows sampled from the model itself: on these it is better than any change of it."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(3, vocabulary, (windows, 1), generator=generator)
    while tokens.shape[1] < window:
        chances = model(tokens).logits[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return tokens


@torch.no_grad()
def hugging_face_losses(model: PreTrainedModel, tokens_NS: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of tokens 2..S, one window at a time, ``[N, S-1]``."""
    losses = []
    for tokens_S in tokens_NS:
        logits = model(tokens_S[None]).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, tokens_S[1:], reduction="none"))
    return torch.stack(losses)


def random_mask(spec: ModelSpec, *, seed: int = 0, off: float = 0.4) -> KeepMask:
    """Random units off, at least one of each group kept."""
    generator = torch.Generator().manual_seed(seed)
    mask = KeepMask(spec.table)
    for group in spec.table.groups:
        order = torch.randperm(group.count, generator=generator)
        mask.of(group)[order[: max(1, min(group.count - 1, round(off * group.count)))]] = False
    return mask


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
