"""The numbers of units that an output layout can hold.

``uniform``: the same numbers in every layer, numbers of heads that the architecture's config
accepts, and FFN channels in multiples of a tile. ``per-layer`` and ``padded``: any numbers; the
tile is 1 unless the user sets it. Every kept layer keeps at least one unit of each kind.
"""

from __future__ import annotations

from dataclasses import dataclass

from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import ATTENTION, FFN, UnitGroup

UNIFORM, PER_LAYER, PADDED = "uniform", "per-layer", "padded"
LAYOUTS = (UNIFORM, PER_LAYER, PADDED)

# Largest share of the block parameters that one tile in every layer may hold. The nearest legal
# size is then at most 1% of the block parameters from any target.
LARGEST_TILE_STEP = 0.02
# torch's grouped matrix products need rows of a multiple of 16 bytes: 8 elements of 2 bytes.
EXPERT_TILE = 8


@dataclass(frozen=True, kw_only=True)
class LayoutRules:
    """The layout's constraints on the numbers of units.

    Attributes:
        layout: one of :data:`LAYOUTS`.
        tile: step of the FFN channels.
        attention_counts: legal numbers of KV groups in a layer, ascending.
        as_mistral: write a Llama with a number of heads that its config class refuses as a Mistral
            that computes the same.
    """

    layout: str
    tile: int
    attention_counts: tuple[int, ...]
    as_mistral: bool = False

    @property
    def uniform(self) -> bool:
        """Whether all layers must have the same numbers of units."""
        return self.layout == UNIFORM

    def heads_fit(self, spec: ModelSpec, heads: int) -> bool:
        """Return whether a config of equal layers can hold this number of query heads."""
        return self.as_mistral or heads_fit(spec, heads)

    def legal_counts(self, kind: str, dense: int) -> tuple[int, ...]:
        """Return the legal numbers of units of a kind, ascending; the last one is ``dense``."""
        if kind == ATTENTION:
            counts = tuple(c for c in self.attention_counts if c < dense)
        else:
            counts = tuple(range(self.tile, dense, self.tile))
        return (*counts, dense)

    def can_cut(self, group: UnitGroup, alive: int) -> bool:
        """Return whether a group with ``alive`` kept units may lose one or more of them."""
        return group.removable and self.legal_counts(group.kind, group.count)[0] < alive


def layout_rules(
    spec: ModelSpec,
    layout: str,
    *,
    tile: int | None = None,
    default_tile: int = 64,
    as_mistral: bool = False,
) -> LayoutRules:
    """Return the rules of a layout for one model.

    Args:
        spec: the dense model.
        layout: one of :data:`LAYOUTS`.
        tile: FFN tile that the user sets; 1 stands for the smallest that the layout can hold. None
            chooses: 1 for ``per-layer`` and ``padded``; for ``uniform``, the largest power of two
            up to ``default_tile`` for which one tile in every layer holds at most 2% of the block
            parameters.
        default_tile: the hardware's tile (128 on a GPU, 64 on a CPU).
        as_mistral: see :class:`LayoutRules`.

    Raises:
        OptionError: the layout is unknown, it cannot carry the other parts of a multimodal model
            along, the FFN cannot hold the tile, or the model cannot be written as a Mistral.
    """
    if layout not in LAYOUTS:
        raise OptionError(f"--layout: {layout!r} is not one of {', '.join(LAYOUTS)}")
    if layout == PER_LAYER and spec.multimodal is not None:
        raise OptionError(
            f"--layout per-layer: no {spec.multimodal.model_type} can have a text model whose "
            "layers differ in width; add --text-only to write the text model alone, or take "
            "--layout uniform or padded, which carry the other parts along"
        )
    if tile is not None and not 1 <= tile <= spec.intermediate:
        raise OptionError(f"--tile: {tile} is outside 1..{spec.intermediate} (the FFN's channels)")
    if tile is None:
        tile = _default_tile(spec, default_tile) if layout == UNIFORM else 1
    rule = spec.family.experts
    if rule is not None and rule.whole_channels is not None:
        tile = spec.intermediate  # no other number of channels is legal
    elif spec.experts and layout == UNIFORM:
        tile = _expert_tile(spec, tile)
    if as_mistral:
        _require_mistral(spec, layout)
    return LayoutRules(
        layout=layout,
        tile=tile,
        attention_counts=_attention_counts(spec, layout, free=as_mistral or layout != UNIFORM),
        as_mistral=as_mistral,
    )


def _expert_tile(spec: ModelSpec, tile: int) -> int:
    """Return a tile whose multiples transformers' products over all experts can read."""
    if tile % EXPERT_TILE and tile not in (1, spec.intermediate):
        raise OptionError(
            f"--tile: {tile} is no multiple of {EXPERT_TILE}; transformers multiplies with all "
            f"experts of a layer at once, which needs multiples of {EXPERT_TILE} channels"
        )
    return max(tile, min(EXPERT_TILE, spec.intermediate))


def _require_mistral(spec: ModelSpec, layout: str) -> None:
    """Refuse models that are not equal to a Mistral: other architectures, layouts or biases."""
    if layout == PER_LAYER:
        raise OptionError("--as-mistral: is for --layout uniform and padded; per-layer needs none")
    if spec.family.model_type != "llama":
        raise OptionError(
            f"--as-mistral: a Llama can be written as a Mistral, this is a "
            f"{spec.family.model_type}; leave it out"
        )
    for layer, tensors in enumerate(spec.layer_tensors):
        for name in tensors:
            if name.endswith(".bias"):
                raise OptionError(
                    f"--as-mistral: this Llama has biases ({spec.prefix(layer)}{name}), a Mistral "
                    "has none; leave it out"
                )


def _attention_counts(spec: ModelSpec, layout: str, *, free: bool) -> tuple[int, ...]:
    """Return the numbers of KV groups that a layer may keep; none if attention stays whole."""
    if spec.whole_attention is not None:
        return ()
    if layout != PER_LAYER and spec.family.head_dim_key is None:
        return ()  # transformers computes the width of a head from their number
    return tuple(
        count
        for count in range(1, spec.kv_heads + 1)
        if free or heads_fit(spec, count * spec.query_heads_per_group)
    )


def heads_fit(spec: ModelSpec, heads: int) -> bool:
    """Return whether the architecture's own config class accepts this number of query heads."""
    if spec.whole_attention is not None:
        return True  # those of the source
    if spec.family.head_dim_key is None:  # the class divides hidden_size by the number of heads
        return heads * spec.head_dim == spec.hidden
    return not spec.family.heads_divide_hidden or spec.hidden % heads == 0


def _default_tile(spec: ModelSpec, largest: int) -> int:
    """Return the largest power of two up to ``largest`` whose step is small enough."""
    one_channel = sum(g.unit_parameters for g in spec.table.groups if g.kind == FFN)
    tile = largest
    while tile > 1 and tile * one_channel > LARGEST_TILE_STEP * spec.block_parameters:
        tile //= 2
    return tile
