"""A family is a table: tensor names, axes and head geometry of one architecture.

In: ``config.json`` as a dict and the checkpoint's tensor shapes. Out: a :class:`ModelSpec`, all
that the planner, the sweep and the rewriter need. Hugging Face's own layer class does the
forward; nothing here computes. Holds no weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from frugal_bonsai.errors import CheckpointError, UnsupportedModelError
from frugal_bonsai.model.units import ATTENTION, FFN, UnitGroup, UnitSlice, UnitTable

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor of a sublayer that loses rows or columns with its units.

    ``width`` is in units of the kind's own measure: ``"query"`` (query heads of a KV group times
    head_dim), ``"head"`` (head_dim) or ``"one"``.
    """

    tensor: str  # inside the layer, without the layer's prefix
    axis: int
    width: str = "one"
    required: bool = True


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names and geometry of one architecture, keyed by ``config.model_type``."""

    model_type: str
    layer_prefix: str  # with {layer}
    embedding: str
    final_norm: str  # tensor prefix of the final norm's parameters
    head: str
    base_module: str  # attribute of the causal model that holds the layers' loop
    layers_module: str  # attribute path of the ModuleList inside the base module
    embedding_module: str  # attribute path of the token embedding inside the base module
    norm_module: str  # attribute path of the final norm inside the base module
    attention_parts: tuple[Part, ...]
    attention_output: str
    ffn_parts: tuple[Part, ...]
    ffn_output: str
    hidden_key: str = "hidden_size"
    layers_key: str = "num_hidden_layers"
    ffn_key: str = "intermediate_size"
    heads_key: str = "num_attention_heads"
    kv_heads_key: str = "num_key_value_heads"
    positions_key: str = "max_position_embeddings"
    # Kind -> the config's key that gives all its projections a bias; without it they get none.
    bias_keys: Mapping[str, str] = field(default_factory=dict)
    # The config demands hidden_size % num_attention_heads == 0 (Llama does; see FORMATS).
    heads_divide_hidden: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model: its family and the numbers from its config and headers.

    Attributes:
        family: the table.
        config: ``config.json``, unchanged.
        layers: number of layers.
        hidden: H, width of the residual stream.
        heads: query heads a layer.
        kv_heads: KV heads a layer.
        head_dim: width of one head.
        intermediate: I, FFN channels a layer (the widest layer's, when they differ).
        vocabulary: V, rows of the token embedding.
        positions: longest window in tokens.
        tied: the head is the token embedding.
        table: the units.
        layer_tensors: for each layer, the names of its tensors inside the layer -> shape.
        other_tensors: names of all tensors outside the layers -> shape.
    """

    family: Family
    config: Mapping[str, Any]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    positions: int
    tied: bool
    table: UnitTable
    layer_tensors: tuple[Mapping[str, tuple[int, ...]], ...]
    other_tensors: Mapping[str, tuple[int, ...]]

    @property
    def query_heads_per_group(self) -> int:
        """Query heads that read one KV head."""
        return self.heads // self.kv_heads

    @property
    def block_parameters(self) -> int:
        """Parameters inside the layers (norms and biases included): what sparsity is a share of."""
        return sum(_size(s) for tensors in self.layer_tensors for s in tensors.values())

    @property
    def parameters(self) -> int:
        """All parameters, a tied head counted once."""
        return self.block_parameters + sum(_size(s) for s in self.other_tensors.values())

    @property
    def head_tensor(self) -> str:
        """Name of the tensor that the head multiplies with."""
        return self.family.embedding if self.tied else self.family.head

    def prefix(self, layer: int) -> str:
        """Prefix of a layer's tensors in the checkpoint."""
        return self.family.layer_prefix.format(layer=layer)


def _size(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def find_family(config: Mapping[str, Any], *, source: str = "config.json") -> Family:
    """The family table for ``config["model_type"]``.

    Raises:
        UnsupportedModelError: if there is none; the text lists those that exist.
    """
    from frugal_bonsai.model.families import FAMILIES

    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(
            f"{source}: model_type {model_type!r} is not supported; supported: {known}. "
            f"docs/adding-a-family.md says how to add one"
        )
    return FAMILIES[model_type]


def describe_model(
    config: Mapping[str, Any], shapes: Shapes, *, source: str = "config.json"
) -> ModelSpec:
    """Build the :class:`ModelSpec` of a model from its config and tensor shapes alone.

    Args:
        config: ``config.json``.
        shapes: tensor name -> shape, from the headers.
        source: file name for error texts.

    Raises:
        UnsupportedModelError: unknown ``model_type``.
        CheckpointError: a tensor is missing or has another shape than the config says.
    """
    family = find_family(config, source=source)
    layers = _positive(config, family.layers_key, source)
    hidden = _positive(config, family.hidden_key, source)
    heads = _positive(config, family.heads_key, source)
    kv_heads = _positive(config, family.kv_heads_key, source, default=heads)
    head_dim = _positive(config, "head_dim", source, default=hidden // heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"{source}: {family.heads_key} {heads} is not a multiple of {family.kv_heads_key} "
            f"{kv_heads}"
        )
    per_layer = _per_layer(config, family, kv_heads, layers, source)
    layer_tensors, used = _split_by_layer(family, shapes, layers)
    groups: list[UnitGroup] = []
    for layer in range(layers):
        prefix = family.layer_prefix.format(layer=layer)
        kv_here, ffn_here = per_layer[layer]
        widths = {"query": heads // kv_heads * head_dim, "head": head_dim, "one": 1}
        for kind, parts, output, count in (
            (ATTENTION, family.attention_parts, family.attention_output, kv_here),
            (FFN, family.ffn_parts, family.ffn_output, ffn_here),
        ):
            groups.append(
                _group(layer, kind, prefix, parts, output, count, widths, hidden, shapes, source)
            )
    embedding_shape = _shape(shapes, family.embedding, source)
    tied = bool(config.get("tie_word_embeddings", False)) or family.head not in shapes
    if tied and not config.get("tie_word_embeddings", True):
        raise CheckpointError(
            f"{source}: tie_word_embeddings is false but the checkpoint has no {family.head}"
        )
    others = {
        name: tuple(shape)
        for name, shape in shapes.items()
        if name not in used and not (tied and name == family.head)
    }
    return ModelSpec(
        family=family,
        config=dict(config),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=max(ffn for _, ffn in per_layer),
        vocabulary=embedding_shape[0],
        positions=_positive(config, family.positions_key, source, default=2048),
        tied=tied,
        table=UnitTable(tuple(groups)),
        layer_tensors=layer_tensors,
        other_tensors=others,
    )


def _positive(
    config: Mapping[str, Any], key: str, source: str, *, default: int | None = None
) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{source}: {key} is {value!r}, expected a positive whole number")
    return value


def _per_layer(
    config: Mapping[str, Any], family: Family, kv_heads: int, layers: int, source: str
) -> list[tuple[int, int]]:
    """(KV heads, FFN channels) of each layer; ``per_layer_config`` overrides the global numbers."""
    # transformers writes the keys with leading zeros ("07") when it saves such a config again.
    overrides = {int(key): value for key, value in (config.get("per_layer_config") or {}).items()}
    counts = []
    for layer in range(layers):
        here = {**config, **overrides.get(layer, {})}
        counts.append(
            (
                _positive(here, family.kv_heads_key, source, default=kv_heads),
                _positive(here, family.ffn_key, source),
            )
        )
    return counts


def _split_by_layer(
    family: Family, shapes: Shapes, layers: int
) -> tuple[tuple[Mapping[str, tuple[int, ...]], ...], set[str]]:
    by_layer: list[dict[str, tuple[int, ...]]] = []
    used: set[str] = set()
    for layer in range(layers):
        prefix = family.layer_prefix.format(layer=layer)
        mine = {
            name.removeprefix(prefix): tuple(shape)
            for name, shape in shapes.items()
            if name.startswith(prefix) and not name.endswith("rotary_emb.inv_freq")
        }
        by_layer.append(mine)
        used.update(name for name in shapes if name.startswith(prefix))
    return tuple(by_layer), used


def _shape(shapes: Shapes, name: str, source: str) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(
            f"{source}: the checkpoint has no tensor {name!r}, which this architecture needs"
        )
    return tuple(shapes[name])


def _group(
    layer: int,
    kind: str,
    prefix: str,
    parts: Sequence[Part],
    output: str,
    count: int,
    widths: Mapping[str, int],
    hidden: int,
    shapes: Shapes,
    source: str,
) -> UnitGroup:
    slices = []
    parameters = 0
    for part in parts:
        name = prefix + part.tensor
        if name not in shapes and not part.required:
            continue
        shape = _shape(shapes, name, source)
        width = widths[part.width]
        other = 1 if len(shape) == 1 else hidden
        expected = (count * width,) if len(shape) == 1 else (count * width, hidden)
        if part.axis == 1:
            expected = (hidden, count * width)
        if shape != expected:
            raise CheckpointError(
                f"{source}: tensor {name} has shape {list(shape)}, expected {list(expected)} "
                f"from the config"
            )
        slices.append(UnitSlice(tensor=name, axis=part.axis, width=width))
        parameters += width * other
    out_name = f"{prefix}{output}.weight"
    columns = next(s.width for s in slices if s.tensor == out_name)
    return UnitGroup(
        layer=layer,
        kind=kind,
        count=count,
        unit_parameters=parameters,
        slices=tuple(slices),
        output=output,
        output_weight=out_name,
        columns_per_unit=columns,
    )
