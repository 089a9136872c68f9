"""One model in llama.cpp's words: its architecture and hyperparameters.

In: a :class:`ModelSpec`. Out: a :class:`Shape`, or an error that says what llama.cpp's graph of
that architecture lacks. A model whose layers differ is written as ``deci``, the one architecture
whose loader takes head counts and FFN lengths layer by layer (llama.cpp's src/models/deci.cpp).
Reads no weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from frugal_bonsai.errors import UnsupportedModelError
from frugal_bonsai.export.architecture import (
    ARCHITECTURES,
    LLAMA,
    PER_LAYER_ARCHITECTURE,
    Architecture,
)
from frugal_bonsai.export.rope import Rope, describe_rope
from frugal_bonsai.model.default_config import plain_values
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import ATTENTION, FFN, KeepMask


@dataclass(frozen=True, kw_only=True)
class Window:
    """Sliding windows.

    Attributes:
        tokens: how many a layer looks back.
        period: every so many layers one has full attention instead.
    """

    tokens: int
    period: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One model in the words of llama.cpp.

    Attributes:
        architecture: name of the GGUF architecture.
        traits: the table's entry of it.
        fused: tensors to take apart; see :class:`Architecture`.
        heads: query heads of each layer.
        kv_heads: KV heads of each layer.
        channels: FFN channels of each layer; of one of its experts where there are any.
        rope: the rotary embedding; None without.
        window: sliding windows; None where all attention is full.
        norm_epsilon: of the norms.
        query_factor: what queries are multiplied by; see :attr:`Architecture.query_scalar`.
        values: names of ``gguf.GGUFWriter``'s methods -> the values of further keys.
    """

    architecture: str
    traits: Architecture
    fused: dict[str, tuple[str, ...]]
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    channels: tuple[int, ...]
    rope: Rope | None
    window: Window | None
    norm_epsilon: float
    query_factor: float
    values: dict[str, Any]

    @property
    def uniform(self) -> bool:
        """Whether all layers are alike."""
        return self.architecture != PER_LAYER_ARCHITECTURE


def describe_shape(spec: ModelSpec, *, source: str = "config.json") -> Shape:
    """The model as llama.cpp will compute it.

    Raises:
        UnsupportedModelError: llama.cpp has no such architecture, or computes this one otherwise.
    """
    from transformers import AutoConfig

    model_type = spec.family.model_type
    if model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{source}: model_type {model_type!r} is not exported to GGUF; exported are: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    own = ARCHITECTURES[model_type]
    kv_heads, channels = KeepMask(spec.table).counts()[ATTENTION], _channels(spec, source)
    alike = len(set(kv_heads)) == len(set(channels)) == len(set(_experts(spec))) == 1
    architecture = _choose(own, spec, kv_heads, alike=alike, source=source)
    config = AutoConfig.for_model(**plain_values(spec))
    _require_known(config, own, spec, source)
    heads = tuple(n * spec.query_heads_per_group for n in kv_heads)
    return Shape(
        architecture=architecture.name if alike else PER_LAYER_ARCHITECTURE,
        traits=architecture,
        fused={} if architecture is own else dict(own.fused),
        heads=heads,
        kv_heads=tuple(kv_heads),
        channels=tuple(channels),
        rope=describe_rope(config, spec, architecture, source),
        window=_window(config, architecture, spec, source),
        norm_epsilon=float(getattr(config, own.norm_epsilon)),
        query_factor=_query_factor(config, architecture, spec, heads[0]),
        values={method: getattr(config, key) for method, key in architecture.keys.items()},
    )


def _channels(spec: ModelSpec, source: str) -> list[int]:
    """FFN channels of each layer, or of each of its experts."""
    channels: list[int] = []
    for layer in range(spec.layers):
        counts = {group.count for group in spec.table.of_layer(layer) if group.kind == FFN}
        if len(counts) != 1:
            raise UnsupportedModelError(
                f"{source}: the experts of layer {layer} have {sorted(counts)} channels, and "
                "llama.cpp takes as many of each; prune with --layout uniform or padded"
            )
        channels += counts
    return channels


def _experts(spec: ModelSpec) -> list[int]:
    return KeepMask(spec.table).experts() or [0]


def _choose(
    own: Architecture, spec: ModelSpec, kv_heads: list[int], *, alike: bool, source: str
) -> Architecture:
    """The family's own architecture, or llama's where only that takes these widths."""
    model_type = spec.family.model_type
    rows = kv_heads[0] * spec.query_heads_per_group * spec.head_dim
    fits = rows == spec.hidden or not own.square
    if alike and fits:
        if own.same_heads and spec.heads != spec.kv_heads:
            raise UnsupportedModelError(
                f"{source}: this {model_type} has {spec.heads} query heads and {spec.kv_heads} KV "
                "heads, and llama.cpp takes as many of both alone"
            )
        return own
    if own.as_llama:
        return LLAMA
    if not alike:
        raise UnsupportedModelError(
            f"{source}: the layers of this {model_type} differ in width, and llama.cpp's "
            f"{PER_LAYER_ARCHITECTURE!r} is the only architecture that allows that, but it does "
            "not compute this one; prune with --layout uniform or padded"
        )
    raise UnsupportedModelError(
        f"{source}: this {model_type} has {rows} rows of q, and llama.cpp's architecture "
        f"{own.name!r} takes as many as the model is wide, {spec.hidden}, alone; prune with "
        "--layout uniform or padded, which leave attention whole"
    )


def _require_known(config: Any, own: Architecture, spec: ModelSpec, source: str) -> None:
    """Refuse what changes the function and that llama.cpp's graph does not have."""
    key = spec.family.activation_key
    activation = getattr(config, key)
    if activation not in own.activations:
        computed = "gelu" if "gelu" in own.activations else own.activations[0]
        raise UnsupportedModelError(
            f"{source}: {key} is {activation!r}; llama.cpp computes {computed} for this "
            "architecture"
        )
    values = config.to_dict()
    for condition in own.refused:
        if condition.holds(values):
            raise UnsupportedModelError(
                f"{source}: {condition.key} is {values.get(condition.key)!r}; llama.cpp's "
                f"architecture {own.name!r} {condition.reason}"
            )
    if own.pause is not None:
        rotated = [int((layer + 1) % own.pause != 0) for layer in range(spec.layers)]
        if list(config.no_rope_layers) != rotated:
            raise UnsupportedModelError(
                f"{source}: no_rope_layers is {list(config.no_rope_layers)}; llama.cpp does "
                f"without rotary embeddings in every layer whose number is a multiple of "
                f"{own.pause} alone (whole layers cannot be dropped: prune without --method depth)"
            )


def _window(config: Any, architecture: Architecture, spec: ModelSpec, source: str) -> Window | None:
    """The sliding window; full attention is the same as one that no text is longer than."""
    tokens = getattr(config, "sliding_window", None)
    period = architecture.window_period
    if period is None:
        sliding = getattr(config, "use_sliding_window", True)
        if tokens is not None and sliding and tokens < spec.positions:
            raise UnsupportedModelError(
                f"{source}: sliding_window is {tokens}; llama.cpp computes full attention for this "
                f"architecture, another function beyond {tokens} tokens. For shorter texts alone, "
                f"set max_position_embeddings to {tokens} in config.json"
            )
        return None
    full = [kind == "full_attention" for kind in config.layer_types]
    assert tokens is not None
    for candidate in (period, *range(1, spec.layers + 2)):
        if full == [(layer + 1) % candidate == 0 for layer in range(spec.layers)]:
            return Window(tokens=int(tokens), period=candidate)
    raise UnsupportedModelError(
        f"{source}: layer_types has full attention in the layers "
        f"{[layer for layer, found in enumerate(full) if found]}; llama.cpp wants it at even "
        "distances (prune without --method depth)"
    )


def _query_factor(config: Any, architecture: Architecture, spec: ModelSpec, heads: int) -> float:
    """What makes scores transformers' where llama.cpp's graph scales them by a width."""
    if architecture.query_scalar is None:
        return 1.0
    width = spec.head_dim
    if spec.layers == architecture.wide_layers:
        width = spec.hidden // heads
    return math.sqrt(width / float(getattr(config, architecture.query_scalar)))
