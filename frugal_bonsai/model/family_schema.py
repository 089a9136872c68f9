"""What a family's table consists of: tensor names, axes, head geometry, and how a layer is wired.

In: nothing. Out: the dataclasses that ``families/`` fills in, one file an architecture. Everything
that differs between architectures stands in a table as data; nothing else asks which family it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor of a sublayer, or a range of one, that loses rows or columns with its units.

    Attributes:
        tensor: name inside the layer, without the layer's prefix; ``{expert}`` stands for the
            number of an expert.
        axis: 0 = output rows, 1 = input columns.
        width: what one unit owns: ``"query"`` (query heads of a KV group times head_dim),
            ``"head"`` (head_dim), ``"group"`` (query heads, key and value, one behind the other)
            or ``"one"``.
        after: widths of the parts that lie before this one in a fused tensor.
        required: False for a bias that only some models have.
    """

    tensor: str
    axis: int = 0
    width: str = "one"
    after: tuple[str, ...] = ()
    required: bool = True


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What a config may say, and what follows from it.

    Attributes:
        key: of ``config.json``; dots lead into nested objects.
        value: holds if the config's value is this one; a config without the key has ``default``.
        differs_from: instead of ``value``: holds if the config has the key and its value is not
            that of this other one.
        other_than: instead of ``value``: holds if the config has the key and its value is not this.
        reason: the rest of a sentence, for error texts and documents.
        default: what transformers takes where the key is absent.
    """

    key: str
    value: Any = None
    differs_from: str | None = None
    other_than: Any = None
    reason: str = ""
    default: Any = None

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Whether this config says so."""
        found: Any = config
        for name in self.key.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        if self.differs_from is not None:
            return found is not None and bool(found != config.get(self.differs_from))
        if self.other_than is not None:
            return found is not None and bool(found != self.other_than)
        return bool((self.default if found is None else found) == self.value)


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Elements a token that one of Hugging Face's layers holds at one of its peaks.

    Multiples of H (hidden), I (FFN channels), C (input columns of the attention's output
    projection), K (columns of a key) and A (query heads times tokens of a window: scores, where
    attention holds them).
    """

    hidden: float = 0
    ffn: float = 0
    attention: float = 0
    key: float = 0
    scores: float = 0

    def elements(self, *, hidden: int, ffn: int, attention: int, key: int, scores: int) -> int:
        """Elements a token, from the sizes."""
        size = self.hidden * hidden + self.ffn * ffn + self.attention * attention
        return math.ceil(size + self.key * key + self.scores * scores)

    def with_copies(self, copies: int) -> Peak:
        """The same, where the activation function holds more copies of the channels."""
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


# A gated FFN behind attention with rotary embeddings, traced in tests/memory/test_activations.py.
GATED_PEAKS = (
    Peak(hidden=2, ffn=3),
    Peak(hidden=1, attention=4, key=2),
    Peak(hidden=1, attention=2, key=5),
)


# Activations that transformers composes of several operations: copies of the channels that they
# hold beside those of one that is a single kernel.
ACTIVATION_COPIES = {"gelu_new": 2, "gelu_fast": 2, "gelu_python": 1, "quick_gelu": 1}


@dataclass(frozen=True, kw_only=True)
class Experts:
    """How a family's layers route tokens to experts; each has an FFN of its own.

    Attributes:
        module: inside the layer, whose forward takes tokens, the numbers of each token's experts
            and their weights, and adds up what the experts give.
        router: tensor inside the layer, one row an expert; its module keeps the number of experts
            a token is sent to as ``top_k``.
        count_keys: names that the config may have for the number of experts; those that it has are
            written.
        chosen_key: how many experts a token is sent to.
        chosen_default: what transformers takes where the config does not say.
    """

    module: str = "mlp.experts"
    router: str = "mlp.gate.weight"
    count_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    chosen_key: str = "num_experts_per_tok"
    chosen_default: int = 8


# Key of our own that states the width of a head where the architecture has none.
HEAD_DIM = "pruned_head_dim"


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names and geometry of one architecture, keyed by ``config.model_type``."""

    model_type: str
    # The family whose table this is, where the user says that the architecture is like it.
    assumed: str | None = None
    # -- names in the checkpoint ------------------------------------------------------------------
    layer_prefix: str  # with {layer}
    embedding: str
    final_norm: str  # tensor prefix of the final norm's parameters
    head: str
    # Tensors inside the layer that are stored as [input, output].
    transposed: tuple[str, ...] = ()
    # Endings of tensors that older checkpoints hold and no model reads.
    unread: tuple[str, ...] = ("rotary_emb.inv_freq",)
    # Names in the checkpoint that differ from the model's own: model's -> checkpoint's.
    stored_as: Mapping[str, str] = field(default_factory=dict)
    # Parts of names inside the layers that do, in the same way.
    stored_parts: Mapping[str, str] = field(default_factory=dict)
    # -- modules ----------------------------------------------------------------------------------
    base_module: str  # attribute path of the module that holds the layers' loop
    layers_module: str  # attribute path of the ModuleList inside the base module
    embedding_module: str  # attribute path of the token embedding inside the base module
    norm_module: str  # attribute path of the final norm inside the base module
    # -- units ------------------------------------------------------------------------------------
    attention_parts: tuple[Part, ...]
    attention_output: str
    ffn_parts: tuple[Part, ...]
    ffn_output: str
    # Layers have experts, whose numbers stand in the names of ``ffn_parts`` and ``ffn_output``.
    experts: Experts | None = None
    # -- keys of the config -----------------------------------------------------------------------
    hidden_key: str = "hidden_size"
    layers_key: str = "num_hidden_layers"
    ffn_key: str = "intermediate_size"
    heads_key: str = "num_attention_heads"
    kv_heads_key: str = "num_key_value_heads"
    positions_key: str = "max_position_embeddings"
    # The key that states the width of a head; None where transformers computes it from the number
    # of heads: then layers can have fewer of them in the per-layer layout alone, whose bundled
    # model builds them.
    head_dim_key: str | None = "head_dim"
    # What transformers takes for keys that a config may leave out.
    defaults: Mapping[str, float] = field(default_factory=dict)
    # FFN channels of a config that leaves them out, as a multiple of the hidden size.
    ffn_times_hidden: int | None = None
    # Kind -> the config's key that gives all its projections a bias; without it they get none.
    bias_keys: Mapping[str, str] = field(default_factory=dict)
    # The config demands hidden_size % num_attention_heads == 0 (Llama does; see FORMATS).
    heads_divide_hidden: bool = False
    # -- wiring -----------------------------------------------------------------------------------
    # Norms between an output projection and the residual stream, modules inside the layer.
    attention_norm: str | None = None
    ffn_norm: str | None = None
    norm_offset: float = 0.0  # what the final norm adds to its weight
    # Keys of factors: of what a sublayer adds to the residual stream, of the logits.
    residual_scale_key: str | None = None
    logits_divisor_key: str | None = None
    logits_softcap_key: str | None = None
    # The layer returns a tuple, of which the first is its output.
    returns_tuple: bool = False
    # Attributes of the attention module that its forward reads sizes from, which must follow the
    # weights that are streamed: path inside the module -> "query" heads, "kv" heads, or
    # "columns" of all query heads.
    sized_by: Mapping[str, str] = field(default_factory=dict)
    # The activation's module, where the FFN is no module of its own.
    ffn_activation: str | None = None
    # The key of the activation's name, and what transformers takes where the config has none.
    activation_key: str = "hidden_act"
    activation: str = "silu"
    peaks: tuple[Peak, ...] = GATED_PEAKS
    # Masks of a window that are held, S*S elements each, where attention needs any.
    masks: int = 0
    # -- limits -----------------------------------------------------------------------------------
    # Any of these makes the model another one than this table describes.
    refused: tuple[Condition, ...] = ()
    # Any of these ties a layer's heads together, so that attention stays whole.
    whole_attention: tuple[Condition, ...] = ()
    # All of these mean that one KV head serves all query heads, whatever kv_heads_key says.
    one_kv_head: tuple[Condition, ...] = ()

    @property
    def title(self) -> str:
        """What reports call it."""
        if self.assumed is None:
            return self.model_type
        return f"{self.model_type}, assumed to be like {self.assumed}"

    def file_name(self, name: str) -> str:
        """What a checkpoint calls a tensor inside the layers, by the model's name."""
        for own, stored in self.stored_parts.items():
            name = name.replace(own, stored)
        return name

    def own_name(self, stored: str) -> str:
        """What the model calls a tensor inside the layers, by the checkpoint's name."""
        for own, part in self.stored_parts.items():
            stored = stored.replace(part, own)
        return stored

    def norm_behind(self, projection: str) -> str | None:
        """The norm between an output projection and the residual stream."""
        return self.attention_norm if projection == self.attention_output else self.ffn_norm
