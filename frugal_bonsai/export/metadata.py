"""What a GGUF file says beside its tensors: hyperparameters and tokenizer.

In: a spec, its :class:`Shape`, a tokenizer. Out: keys in a ``gguf.GGUFWriter``, which knows their
names. Holds the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from frugal_bonsai.export.rope import Rope
from frugal_bonsai.export.shape import Shape
from frugal_bonsai.export.tokenizer import GgufTokenizer
from frugal_bonsai.model.family import ModelSpec

if TYPE_CHECKING:
    from gguf import GGUFWriter


def add_model(writer: GGUFWriter, spec: ModelSpec, shape: Shape, name: str, dtype: str) -> None:
    """The hyperparameters, under the keys that llama.cpp reads for this architecture."""
    import gguf

    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(int(gguf.LlamaFileType[kinds[dtype]]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(spec.positions)
    writer.add_embedding_length(spec.hidden)
    writer.add_block_count(spec.layers)
    writer.add_vocab_size(spec.vocabulary)
    # Arrays where layers differ: deci takes them, and takes nothing else.
    one = shape.uniform
    writer.add_head_count(shape.heads[0] if one else list(shape.heads))
    writer.add_head_count_kv(shape.kv_heads[0] if one else list(shape.kv_heads))
    writer.add_feed_forward_length(shape.channels[0] if one else list(shape.channels))
    # The default, embedding_length / head_count, is wrong for a pruned model.
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    if spec.experts:
        writer.add_expert_count(spec.experts)
        writer.add_expert_used_count(spec.experts_chosen)
        writer.add_expert_feed_forward_length(shape.channels[0])
    if shape.traits.layer_norm:
        writer.add_layer_norm_eps(shape.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    if shape.rope is not None:
        _add_rope(writer, shape.rope)
    if shape.window is not None:
        writer.add_sliding_window(shape.window.tokens)
        # Only where it is another than the architecture's: older loaders do not know the key.
        if shape.window.period != shape.traits.window_period:
            writer.add_sliding_window_pattern(shape.window.period)
    for method, value in shape.values.items():
        getattr(writer, method)(value)


def _add_rope(writer: GGUFWriter, rope: Rope) -> None:
    import gguf

    writer.add_rope_dimension_count(rope.dimensions)
    writer.add_rope_freq_base(rope.base)
    if rope.local_base is not None:
        writer.add_rope_freq_base_swa(rope.local_base)
    if rope.scale != 1.0:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.scale)
    if rope.original_positions is not None:
        writer.add_rope_scaling_orig_ctx_len(rope.original_positions)
        writer.add_rope_scaling_attn_factors(rope.attention_factor)


def add_tokenizer(writer: GGUFWriter, tokenizer: GgufTokenizer) -> None:
    """The vocabulary and how text is split, as far as llama.cpp reads it from the file."""
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    if tokenizer.scores is not None:
        writer.add_token_scores(tokenizer.scores)
    if tokenizer.merges is not None:
        writer.add_token_merges(tokenizer.merges)
    add_id = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for kind, at in tokenizer.special_ids.items():
        add_id[kind](at)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(tokenizer.add_eos)
    writer.add_add_space_prefix(tokenizer.add_space_prefix)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
