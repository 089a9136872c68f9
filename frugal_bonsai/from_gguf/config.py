"""Read transformers' config from the metadata of a GGUF file.

In: a header. Out: what ``config.json`` would hold, or an error that names the architecture or the
key. The reverse of :mod:`frugal_bonsai.export.shape`, with the same table. transformers' own reader
leaves values at the defaults of the config class (rotary scaling, soft caps, the width of a head),
which are one checkpoint's. Reads no weights except factors of rotary embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from frugal_bonsai.checkpoint.gguf_header import TOKENS, GgufHeader, GgufTensor
from frugal_bonsai.errors import CheckpointError, UnsupportedModelError
from frugal_bonsai.export.architecture import (
    ARCHITECTURES,
    PER_LAYER_ARCHITECTURE,
    Architecture,
)
from frugal_bonsai.from_gguf.keys import Keys, gguf_key
from frugal_bonsai.from_gguf.rope import read_rope
from frugal_bonsai.model.families import FAMILIES
from frugal_bonsai.model.family_schema import Family
from frugal_bonsai.model.units import ATTENTION, FFN

# llama.cpp's architecture -> model_type. ``llama`` may become another; see find_model_type.
MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "smollm3": "smollm3",
    "granite": "granite",
    "olmo2": "olmo2",
    "olmoe": "olmoe",
    "stablelm": "stablelm",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "gpt2": "gpt2",
    "gptneox": "gpt_neox",
    "falcon": "falcon",
    "gemma": "gemma",
    "seed_oss": "seed_oss",
    "arcee": "arcee",
    "starcoder2": "starcoder2",
    "nemotron": "nemotron",
    "ernie4_5": "ernie4_5",
    "glm4": "glm4",
    "chatglm": "glm",
    "command-r": "cohere",
    "cohere2": "cohere2",
    "exaone4": "exaone4",
    "hunyuan-dense": "hunyuan_v1_dense",
}
# model_type -> transformers' class. Its own table is in a module that imports torch.
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "falcon": "FalconForCausalLM",
    "gemma": "GemmaForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "arcee": "ArceeForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "glm": "GlmForCausalLM",
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM",
}
_TOKEN_IDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}
_NORM_KEYS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
_BIASED = {ATTENTION: ("attn_q", "attn_k", "attn_v", "attn_output"), FFN: ("ffn_",)}


def find_model_type(header: GgufHeader, tensors: Iterable[str]) -> str:
    """Return the ``model_type`` of transformers that computes a file's architecture.

    Raises:
        UnsupportedModelError: the architecture is not read. The text names those that are.
    """
    keys = Keys(header)
    if keys.architecture == PER_LAYER_ARCHITECTURE:
        raise UnsupportedModelError(
            f"{header.path}: is of the architecture {PER_LAYER_ARCHITECTURE!r}, whose layers "
            "differ in width; name the pruned folder that it was exported from"
        )
    if keys.architecture not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"{header.path}: GGUF files of the architecture {keys.architecture!r} are not read "
            f"({', '.join(sorted(MODEL_TYPES))} are); use the original checkpoint, if "
            "docs/families.md lists its family"
        )
    model_type = MODEL_TYPES[keys.architecture]
    if model_type == "llama":
        if keys.get("expert_count", 0):
            return "mixtral"
        roles = {name.split(".", 2)[2] for name in tensors if name.startswith("blk.")}
        if "attn_q.bias" in roles and "attn_output.bias" not in roles:
            return "qwen2"  # a pruned one: see Architecture.as_llama
        if keys.number("embedding_length") % keys.number("attention.head_count"):
            return "mistral"  # Llama's config class refuses such a number of heads
    return model_type


def read_config(
    header: GgufHeader, tensors: dict[str, GgufTensor], dtype: str
) -> tuple[dict[str, Any], list[str]]:
    """Return the config, and notes for the user.

    Args:
        header: header of the (first) file.
        tensors: the tensors of all its parts.
        dtype: torch's name of the dtype in which the weights are read.

    Raises:
        UnsupportedModelError: the architecture, or a variant of it, is not read.
        CheckpointError: a key or the token embedding is missing.
    """
    keys = Keys(header)
    model_type = find_model_type(header, tensors)
    family, architecture = FAMILIES[model_type], ARCHITECTURES[model_type]
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(
            f"{header.path}: has no token embedding (token_embd.weight); name the first part of a "
            "split model, or download the file again"
        )
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [CLASSES[model_type]],
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": dtype,
        **_sizes(keys, family),
        **_values(keys, architecture),
        **_token_ids(header),
    }
    head_dim = _head_dim(keys, family, config)
    config |= read_rope(keys, architecture, head_dim)
    config |= _windows(keys, architecture, config[family.layers_key])
    config |= _variants(model_type, tensors, config)
    for kind, key in family.bias_keys.items():
        config[key] = any(
            name.endswith(".bias") and name.split(".")[-2].startswith(_BIASED[kind])
            for name in tensors
        )
    if architecture.query_scalar is not None:
        # llama.cpp scales the scores so; whoever made the file put the rest into the weights.
        wide = config[family.layers_key] == architecture.wide_layers
        width = config[family.hidden_key] // config[family.heads_key] if wide else head_dim
        config[architecture.query_scalar] = width
    keys.get("attention.value_length")
    return config, [_unread_note(keys, name) for name in keys.unread()]


def _sizes(keys: Keys, family: Family) -> dict[str, Any]:
    """Return numbers of layers, heads, channels and experts."""
    heads = keys.number("attention.head_count")
    channels = keys.get("feed_forward_length")
    sizes = {
        family.hidden_key: keys.number("embedding_length"),
        family.layers_key: keys.number("block_count"),
        family.positions_key: keys.number("context_length"),
        family.kv_heads_key: keys.get("attention.head_count_kv", heads),
        family.heads_key: heads,
        family.ffn_key: keys.get("expert_feed_forward_length", channels),
    }
    if family.experts is not None:
        key = "num_local_experts" if family.model_type == "mixtral" else "num_experts"
        sizes[key] = keys.number("expert_count")
        sizes[family.experts.chosen_key] = keys.number("expert_used_count")
    return sizes


def _head_dim(keys: Keys, family: Family, config: dict[str, Any]) -> int:
    """Return the width of a head, and put it into the config if that has a key for it."""
    width = config[family.hidden_key] // config[family.heads_key]
    head_dim: int = keys.get("attention.key_length", width)
    if keys.get("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(
            f"{keys.header.path}: keys have {head_dim} dimensions and values "
            f"{keys.get('attention.value_length')}; this program wants the same number"
        )
    if family.head_dim_key is not None:
        config[family.head_dim_key] = head_dim
    elif head_dim != width:
        raise UnsupportedModelError(
            f"{keys.header.path}: heads have {head_dim} dimensions, and transformers computes "
            f"{width} for a {family.model_type}; use the folder that the file was made from"
        )
    return head_dim


def _values(keys: Keys, architecture: Architecture) -> dict[str, Any]:
    """Return the values whose keys the table names, such as the norms' epsilon."""
    values = {}
    for method, key in architecture.keys.items():
        name = gguf_key(method, keys.architecture)
        value = keys.get(name)
        if value is not None:
            values[key] = value
        elif key in _NORM_KEYS:
            raise CheckpointError(
                f"{keys.header.path}: has no {keys.architecture}.{name}; convert the model again "
                "with a current llama.cpp"
            )
    return values


def _windows(keys: Keys, architecture: Architecture, layers: int) -> dict[str, Any]:
    """Return the keys of sliding windows."""
    tokens, period = keys.get("attention.sliding_window"), architecture.window_period
    if period is None:
        return {"sliding_window": tokens or None} if architecture.name == "phi3" else {}
    pattern = keys.array("attention.sliding_window_pattern")
    if pattern is None:
        period = keys.get("attention.sliding_window_pattern", period)
        pattern = [(layer + 1) % period != 0 for layer in range(layers)]
    kinds = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    return {"sliding_window": tokens, "layer_types": kinds}


def _variants(model_type: str, tensors: Iterable[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the switches of an architecture, as llama.cpp's graph computes it."""
    roles = {name.split(".", 2)[2] for name in tensors if name.startswith("blk.")}
    if model_type == "qwen3_moe":
        return {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if model_type == "stablelm":
        return {
            "use_qkv_bias": "attn_q.bias" in roles,
            "use_parallel_residual": "ffn_norm.weight" not in roles,
        }
    if model_type == "falcon":
        one_head = config["num_kv_heads"] == 1
        return {
            "multi_query": one_head,
            "new_decoder_architecture": not one_head,
            "num_ln_in_parallel_attn": 2 if "attn_norm_2.weight" in roles else 1,
        }
    return {"sliding_window": None} if model_type == "mistral" else {}


def _token_ids(header: GgufHeader) -> dict[str, Any]:
    """Return the ids of special tokens; None where the file has none."""
    tokens = header.metadata.get(TOKENS)
    count = len(tokens) if isinstance(tokens, list) else tokens
    ids = {}
    for key, name in _TOKEN_IDS.items():
        value = header.metadata.get(f"tokenizer.ggml.{name}")
        ids[key] = value if isinstance(value, int) and value < (count or 0) else None
    return ids


def _unread_note(keys: Keys, name: str) -> str:
    value = str(keys.header.metadata[name])[:40]
    return f"{keys.header.path.name}: the key {name} ({value}) is not read"
