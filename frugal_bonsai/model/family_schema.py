"""The schema of a family's table: tensor names, axes, head geometry and wiring of a layer.

``families/`` has one file per architecture, which fills in these dataclasses. All differences
between architectures are data in these tables; no other code depends on the name of a family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from frugal_bonsai.model.expert_schema import Experts


@dataclass(frozen=True, kw_only=True)
class Part:
    """A tensor, or a range of a fused tensor, that loses rows or columns with its units.

    Attributes:
        tensor: name inside the layer, without the layer's prefix. ``{expert}`` stands for the
            index of an expert.
        axis: 0 for output rows, 1 for input columns.
        width: number of rows or columns of one unit: ``"one"``, ``"pair"`` (two), ``"head"``
            (head_dim), ``"heads"`` (query heads of a KV group), ``"query"`` (those x head_dim), or
            ``"group"`` (its query heads, key and value in a row).
        after: widths of the parts before this one in a fused tensor.
        required: False for a bias that only some models have.
    """

    tensor: str
    axis: int = 0
    width: str = "one"
    after: tuple[str, ...] = ()
    required: bool = True


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A condition on ``config.json``. One of ``value``, ``differs_from``, ``other_than`` is set.

    Attributes:
        key: key of the config. A dot leads into a nested object.
        value: the condition holds if the config has this value under ``key``.
        differs_from: another key; the condition holds if ``key`` is present and the two values
            differ.
        other_than: the condition holds if ``key`` is present and has another value.
        reason: consequence of the condition as the end of a sentence, for error texts and docs.
        default: value that transformers takes if ``key`` is absent.
    """

    key: str
    value: Any = None
    differs_from: str | None = None
    other_than: Any = None
    reason: str = ""
    default: Any = None

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Return whether the condition holds for a config."""
        found: Any = config
        for name in self.key.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        if self.differs_from is not None:
            return found is not None and bool(found != config.get(self.differs_from))
        if self.other_than is not None:
            found = self.default if found is None else found
            return found is not None and bool(found != self.other_than)
        return bool((self.default if found is None else found) == self.value)


def always(reason: str) -> Condition:
    """Return a condition that holds for every model of a family."""
    return Condition(key="model_type", other_than="", reason=reason)


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Elements per token that Hugging Face's layer holds at one of its memory peaks.

    The attributes are multiples of sizes.

    Attributes:
        hidden: multiples of H, the width of the residual stream.
        ffn: multiples of I, the FFN channels.
        attention: multiples of C_o, the input columns of the attention's output projection.
        key: multiples of K, the columns of a key.
        scores: multiples of A, query heads x tokens of a window, if attention holds its scores.
    """

    hidden: float = 0
    ffn: float = 0
    attention: float = 0
    key: float = 0
    scores: float = 0

    def elements(self, *, hidden: int, ffn: int, attention: int, key: int, scores: int) -> int:
        """Return the elements per token for given sizes."""
        size = self.hidden * hidden + self.ffn * ffn + self.attention * attention
        return math.ceil(size + self.key * key + self.scores * scores)

    def with_copies(self, copies: int) -> Peak:
        """Return the peak with further copies of the FFN channels."""
        return replace(self, ffn=self.ffn + copies) if self.ffn else self

    def __str__(self) -> str:
        terms = (
            (self.hidden, "H"),
            (self.ffn, "I"),
            (self.attention, "C_o"),
            (self.key, "K"),
            (self.scores, "A"),
        )
        return "+".join(f"{'' if n == 1 else f'{n:g}'}{name}" for n, name in terms if n)


# Peaks of attention with rotary embeddings and a gated FFN, traced in
# tests/memory/test_activations.py.
GATED_PEAKS = (
    Peak(hidden=2, ffn=3),
    Peak(hidden=1, attention=4, key=2),
    Peak(hidden=1, attention=2, key=5),
)


# Activation functions that transformers composes of several operations -> copies of the channels
# that they hold beyond those of an activation with a single kernel.
ACTIVATION_COPIES = {"gelu_new": 2, "gelu_fast": 2, "gelu_python": 1, "quick_gelu": 1}


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """The module that mixes tokens in some layers: attention, linear attention, a convolution.

    Attributes:
        output: its output projection, a module inside the layer.
        returns_tuple: it returns a tuple, as attention of transformers does.
    """

    output: str
    returns_tuple: bool = False


# Our own config key for the width of a head, for architectures without such a key.
HEAD_DIM = "pruned_head_dim"


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names and geometry of one architecture, keyed by ``config.model_type``."""

    model_type: str
    models: str  # names of its models, for people
    # The family that lent this table, if the user assumes that the architecture is like it.
    assumed: str | None = None
    # -- names in the checkpoint ------------------------------------------------------------------
    layer_prefix: str  # with {layer} for the index of the layer
    embedding: str
    final_norm: str  # tensor prefix of the final norm's parameters
    head: str
    # Endings of weights that are stored as [input, output].
    transposed: tuple[str, ...] = ()
    # Endings of tensors of two dimensions that no matrix product reads, which are not quantised.
    unquantised: tuple[str, ...] = ()
    # Endings of tensors that keep their stored dtype while a layer is computed.
    exact: tuple[str, ...] = ()
    # Endings of tensors that checkpoints hold and no model reads; beginnings, if they end in a dot.
    unread: tuple[str, ...] = ("rotary_emb.inv_freq",)
    # Tensor names that differ: the model's name -> the checkpoint's name.
    stored_as: Mapping[str, str] = field(default_factory=dict)
    # Parts of tensor names inside the layers that differ: the model's -> the checkpoint's.
    stored_parts: Mapping[str, str] = field(default_factory=dict)
    # -- modules: attribute paths -----------------------------------------------------------------
    base_module: str  # the module whose forward loops over the layers
    layers_module: str  # the ModuleList of the layers, inside the base module
    embedding_module: str  # the token embedding, inside the base module
    norm_module: str  # the final norm, inside the base module
    # -- units ------------------------------------------------------------------------------------
    # Empty if attention has a form that units do not describe: it is one unit, which stays. Only
    # the input columns of its output projection are known. ``whole_attention`` says why.
    attention_parts: tuple[Part, ...]
    attention_output: str
    # What mixes tokens in layers without attention. Each layer has one of these, or attention.
    other_mixers: tuple[Mixer, ...] = ()
    ffn_parts: tuple[Part, ...]
    ffn_output: str
    # Experts of the layers; ``ffn_parts`` and ``ffn_output`` then contain ``{expert}``.
    experts: Experts | None = None
    # -- keys of the config -----------------------------------------------------------------------
    hidden_key: str = "hidden_size"
    layers_key: str = "num_hidden_layers"
    ffn_key: str = "intermediate_size"
    heads_key: str = "num_attention_heads"
    kv_heads_key: str = "num_key_value_heads"
    positions_key: str = "max_position_embeddings"
    # Key for the width of a head. None if transformers computes the width from the number of heads:
    # then only the per-layer layout, which has a bundled model, can hold layers with fewer heads.
    head_dim_key: str | None = "head_dim"
    # Values that transformers takes for keys that a config may omit.
    defaults: Mapping[str, float] = field(default_factory=dict)
    # Values that a config gets together with the width of the FFN's tensors, which it then states;
    # a key with None is removed. For architectures whose config states another width.
    stated: Mapping[str, Any] = field(default_factory=dict)
    # Keys of per_layer_config that are the architecture's own -> the global keys under which its
    # config class takes the same values, for layers of full attention.
    full_attention_keys: Mapping[str, str] = field(default_factory=dict)
    # FFN channels as a multiple of the hidden size, for configs that omit them.
    ffn_times_hidden: int | None = None
    # Kind of unit -> config key that gives a bias to all projections of this kind.
    bias_keys: Mapping[str, str] = field(default_factory=dict)
    # Key for the number of layers behind the last one, for further tokens, which are not read.
    further_layers_key: str | None = None
    # The config class requires hidden_size % num_attention_heads == 0 (see docs/formats.md).
    heads_divide_hidden: bool = False
    # -- wiring -----------------------------------------------------------------------------------
    # Norms between an output projection and the residual stream: modules inside the layer.
    attention_norm: str | None = None
    ffn_norm: str | None = None
    norm_offset: float = 0.0  # constant that the final norm adds to its weight
    residual_scale_key: str | None = None  # factor of a sublayer's output
    logits_divisor_key: str | None = None
    logits_scale_key: str | None = None
    logits_softcap_key: str | None = None
    # The layer returns a tuple with its output first, not a tensor.
    returns_tuple: bool = False
    # Attributes from which the attention's forward reads sizes, and which must match the streamed
    # weights: path inside the attention module -> "query" (number of query heads), "kv" (number of
    # KV heads) or "columns" (columns of all query heads).
    sized_by: Mapping[str, str] = field(default_factory=dict)
    # Module of the activation function, for layers whose FFN is not one module.
    ffn_activation: str | None = None
    # Key for the name of the activation function, and the name if the config omits it.
    activation_key: str = "hidden_act"
    activation: str = "silu"
    peaks: tuple[Peak, ...] = GATED_PEAKS
    masks: int = 0  # attention masks of a window that a layer holds, S*S elements each
    # -- limits -----------------------------------------------------------------------------------
    # The table does not describe models for which one of these conditions holds.
    refused: tuple[Condition, ...] = ()
    # If one of these holds, heads depend on each other and attention cannot be pruned.
    whole_attention: tuple[Condition, ...] = ()
    # If one of these holds, no layer can be dropped.
    whole_layers: tuple[Condition, ...] = ()
    # If all of these hold, a layer has one KV head, whatever ``kv_heads_key`` states.
    one_kv_head: tuple[Condition, ...] = ()

    def is_read(self, name: str) -> bool:
        """Return whether a model reads a checkpoint's tensor of this name."""
        beginnings = tuple(part for part in self.unread if part.endswith("."))
        return not (name.endswith(self.unread) or name.startswith(beginnings))

    @property
    def title(self) -> str:
        """Name for reports."""
        if self.assumed is None:
            return self.model_type
        return f"{self.model_type}, assumed to be like {self.assumed}"

    def file_name(self, name: str) -> str:
        """Return the checkpoint's name of a tensor inside the layers from the model's name."""
        for own, stored in self._stored_parts(name).items():
            name = name.replace(own, stored)
        return name

    def own_name(self, stored: str) -> str:
        """Return the model's name of a tensor inside the layers from the checkpoint's name."""
        for own, part in self._stored_parts(stored).items():
            stored = stored.replace(part, own)
        return stored

    def _stored_parts(self, name: str) -> Mapping[str, str]:
        """Return the parts of a name that differ in checkpoints: the model's -> theirs."""
        if self.experts is None or f".{self.experts.module}." not in name:
            return self.stored_parts
        return {**self.stored_parts, **self.experts.stored_parts}

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """Attention and what takes its place in other layers."""
        return (Mixer(output=self.attention_output, returns_tuple=True), *self.other_mixers)

    def norm_behind(self, projection: str) -> str | None:
        """Return the module of the norm between an output projection and the residual stream."""
        mixes = any(mixer.output == projection for mixer in self.mixers)
        return self.attention_norm if mixes else self.ffn_norm
