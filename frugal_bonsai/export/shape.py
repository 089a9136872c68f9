"""Describe a model in llama.cpp's terms: its architecture, widths and further keys.

In: a :class:`ModelSpec`. Out: a :class:`Shape`, or an error that names the feature that llama.cpp's
graph of the architecture lacks. A model whose layers differ in width is written as ``deci``, the
one architecture whose loader takes head counts and FFN lengths layer by layer (llama.cpp's
src/models/deci.cpp). Reads no weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gguf
from transformers import AutoConfig

from frugal_bonsai.errors import UnsupportedModelError
from frugal_bonsai.export.architecture import (
    ARCHITECTURES,
    CONVERTED_ELSEWHERE,
    PER_LAYER_ARCHITECTURE,
    Architecture,
)
from frugal_bonsai.export.rope import Factors, Keys, describe_rope
from frugal_bonsai.model.default_config import default_config
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import ATTENTION, FFN, KeepMask


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One model in llama.cpp's terms.

    Attributes:
        architecture: Name of the GGUF architecture.
        traits: The entry of the table for the graph that computes the model.
        heads: Query heads of each layer.
        kv_heads: KV heads of each layer.
        channels: FFN channels of each layer, or of each of a layer's experts.
        query_factor: Factor of the queries; see :attr:`Architecture.query_scalar`.
        keys: Methods of ``gguf.GGUFWriter`` and their arguments, for what differs between
            architectures.
        factors: Divisors of the rotary embedding's frequencies, by name of their tensor.
    """

    architecture: str
    traits: Architecture
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    channels: tuple[int, ...]
    query_factor: float
    keys: Keys
    factors: Factors


def describe_shape(spec: ModelSpec) -> Shape:
    """Return the model as llama.cpp will compute it.

    Raises:
        UnsupportedModelError: llama.cpp lacks the architecture, or computes another function.
    """
    model_type = spec.family.model_type
    if model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not exported to GGUF; {_way_out(model_type)}; exported "
            f"are: {', '.join(sorted(ARCHITECTURES))}"
        )
    own = ARCHITECTURES[model_type]
    kv_heads, channels = KeepMask(spec.table).counts()[ATTENTION], _channels(spec)
    experts = KeepMask(spec.table).experts()
    alike = all(len(set(counts)) <= 1 for counts in (kv_heads, channels, experts))
    architecture = _choose(own, spec, kv_heads, alike=alike)
    config = AutoConfig.for_model(**default_config(spec))
    _require_known(config, own, spec)
    heads = tuple(count * spec.query_heads_per_group for count in kv_heads)
    rope, factors = describe_rope(config, spec, architecture)
    keys = {method: getattr(config, key) for method, key in architecture.keys.items()}
    return Shape(
        architecture=architecture.name if alike else PER_LAYER_ARCHITECTURE,
        traits=architecture,
        heads=heads,
        kv_heads=tuple(kv_heads),
        channels=tuple(channels),
        query_factor=_query_factor(config, architecture, spec, heads[0]),
        keys=keys | rope | _window(config, architecture, spec),
        factors=factors,
    )


def _way_out(model_type: str) -> str:
    """Return what to do with a family that is not exported, as a part of a sentence."""
    name = CONVERTED_ELSEWHERE.get(model_type)
    if name is None:
        return "llama.cpp does not have this architecture"
    return (
        f"llama.cpp has it as {name!r}: try its own convert_hf_to_gguf.py with an output whose "
        "layers are alike (--layout uniform or padded)"
    )


def model_keys(spec: ModelSpec, shape: Shape, name: str, dtype: str) -> Keys:
    """Return all keys of the model, for ``gguf.GGUFWriter``."""
    per_layer = shape.architecture == PER_LAYER_ARCHITECTURE
    file_type = "ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"
    keys: Keys = {
        "add_type": "model",
        "add_name": name,
        "add_file_type": gguf.LlamaFileType[file_type],
        "add_quantization_version": gguf.GGML_QUANT_VERSION,
        "add_context_length": spec.positions,
        "add_embedding_length": spec.hidden,
        "add_block_count": spec.layers,
        "add_vocab_size": spec.vocabulary,
        # Only deci takes arrays, and it takes nothing else.
        "add_head_count": shape.heads if per_layer else shape.heads[0],
        "add_head_count_kv": shape.kv_heads if per_layer else shape.kv_heads[0],
        "add_feed_forward_length": shape.channels if per_layer else shape.channels[0],
        # The default, embedding_length / head_count, is wrong for a pruned model.
        "add_key_length": spec.head_dim,
        "add_value_length": spec.head_dim,
    }
    if spec.experts:
        keys["add_expert_count"] = spec.experts
        keys["add_expert_used_count"] = spec.experts_chosen
        keys["add_expert_feed_forward_length"] = shape.channels[0]
    return keys | shape.keys


def _channels(spec: ModelSpec) -> list[int]:
    """Return the FFN channels of each layer, or of each of a layer's experts."""
    channels: list[int] = []
    for layer in range(spec.layers):
        counts = {group.count for group in spec.table.of_layer(layer) if group.kind == FFN}
        if len(counts) != 1:
            raise UnsupportedModelError(
                f"the experts of layer {layer} have {sorted(counts)} channels, and "
                "llama.cpp wants the same number in each; prune with --layout uniform or padded"
            )
        channels += counts
    return channels


def _choose(
    own: Architecture, spec: ModelSpec, kv_heads: list[int], *, alike: bool
) -> Architecture:
    """Return the family's own architecture, or llama's where only that takes these widths."""
    model_type = spec.family.model_type
    rows = kv_heads[0] * spec.query_heads_per_group * spec.head_dim
    if alike and (rows == spec.hidden or "attn_q" not in own.fixed_rows):
        if "attn_k" in own.fixed_rows and spec.heads != spec.kv_heads:
            raise UnsupportedModelError(
                f"this {model_type} has {spec.heads} query heads and {spec.kv_heads} KV "
                "heads, and llama.cpp wants the same number of both"
            )
        return own
    if own.as_llama is not None:
        return own.as_llama
    why = (
        f"this {model_type} has {rows} rows of q, and llama.cpp's architecture {own.name!r} wants "
        f"as many as the model is wide, {spec.hidden}"
    )
    if not alike:
        why = (
            f"the layers of this {model_type} differ in width, and llama.cpp's only architecture "
            f"that allows that, {PER_LAYER_ARCHITECTURE!r}, computes another function"
        )
    raise UnsupportedModelError(f"{why}; prune with --layout uniform or padded")


def _require_known(config: Any, own: Architecture, spec: ModelSpec) -> None:
    """Raise for values of the config that change the function and that the graph ignores."""
    key = spec.family.activation_key
    activation = getattr(config, key)
    if activation not in own.activations:
        computed = "gelu" if "gelu" in own.activations else own.activations[0]
        raise UnsupportedModelError(
            f"{key} is {activation!r}; llama.cpp computes {computed} for this architecture"
        )
    for key, present in own.switches.items():
        value = getattr(config, key, None)
        if bool(value) != present:
            raise UnsupportedModelError(
                f"{key} is {value!r}; llama.cpp's architecture {own.name!r} computes the model "
                f"{'with' if present else 'without'} it"
            )
    if own.pause is not None:
        rotated = [int((layer + 1) % own.pause != 0) for layer in range(spec.layers)]
        if list(config.no_rope_layers) != rotated:
            raise UnsupportedModelError(
                f"no_rope_layers is {list(config.no_rope_layers)}; llama.cpp omits the "
                "rotary embedding exactly in the layers whose number is a multiple of "
                f"{own.pause} (dropped layers change the numbers: prune without --method depth)"
            )


def _window(config: Any, architecture: Architecture, spec: ModelSpec) -> Keys:
    """Return the keys of sliding windows; none where all layers have full attention."""
    tokens = getattr(config, "sliding_window", None)
    period = architecture.window_period
    if period is None:
        sliding = getattr(config, "use_sliding_window", True)
        if tokens is not None and sliding and tokens < spec.positions:
            raise UnsupportedModelError(
                f"sliding_window is {tokens}; llama.cpp computes full attention for this "
                f"architecture, another function beyond {tokens} tokens. To export for shorter "
                f"texts only, set max_position_embeddings to {tokens} in config.json"
            )
        return {}
    full = [kind == "full_attention" for kind in config.layer_types]
    for candidate in (period, *range(1, spec.layers + 2)):
        if full == [(layer + 1) % candidate == 0 for layer in range(spec.layers)]:
            # Older loaders do not know the pattern's key. They need none for the usual period.
            other = {} if candidate == period else {"add_sliding_window_pattern": candidate}
            return {"add_sliding_window": tokens, **other}
    raise UnsupportedModelError(
        f"layer_types has full attention in the layers "
        f"{[layer for layer, found in enumerate(full) if found]}; llama.cpp wants it at equal "
        "distances (prune without --method depth)"
    )


def _query_factor(config: Any, architecture: Architecture, spec: ModelSpec, heads: int) -> float:
    """Return the factor by which llama.cpp's scores become transformers'."""
    if architecture.query_scalar is None:
        return 1.0
    width = spec.head_dim
    if spec.layers == architecture.wide_layers:
        width = spec.hidden // heads
    return math.sqrt(width / float(getattr(config, architecture.query_scalar)))
