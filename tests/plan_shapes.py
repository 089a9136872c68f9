"""Llamas of real shapes, no weights."""

from __future__ import annotations

from frugal_bonsai.model.family import ModelSpec, describe_model


def shapes(
    layers: int,
    hidden: int,
    ffn: int,
    vocabulary: int,
    kv: int,
    head_dim: int = 128,
    tied: bool = False,
) -> ModelSpec:
    """A Llama of these shapes, no weights."""
    heads = hidden // head_dim
    tensors = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    if not tied:
        tensors["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv * head_dim, hidden),
            "self_attn.v_proj": (kv * head_dim, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():
            tensors[f"{prefix}{name}.weight"] = shape
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
        "head_dim": head_dim,
        "tie_word_embeddings": tied,
    }
    return describe_model(config, tensors)


LLAMA_1B = shapes(16, 2048, 8192, 128256, 8, head_dim=64, tied=True)
LLAMA_8B = shapes(32, 4096, 14336, 128256, 8)
LLAMA_70B = shapes(80, 8192, 28672, 128256, 8)
