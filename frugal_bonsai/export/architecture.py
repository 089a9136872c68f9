"""What llama.cpp calls an architecture, and which models it computes as transformers does.

In: a :class:`ModelSpec`. Out: the GGUF architecture's name, how its rotary embedding pairs the
dimensions of a head, and its hyperparameters; or an error that says what llama.cpp's graph of that
architecture lacks. A model whose layers differ is written as ``deci``, the one architecture whose
loader takes head counts and FFN lengths layer by layer (llama.cpp's src/models/deci.cpp). Reads no
weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from frugal_bonsai.errors import UnsupportedModelError
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.plain import plain_values
from frugal_bonsai.model.units import ATTENTION, FFN, KeepMask

PER_LAYER_ARCHITECTURE = "deci"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp computes one of transformers' architectures.

    Attributes:
        name: of the GGUF architecture.
        interleaved: its rotary embedding turns neighbouring dimensions; transformers' turns a
            dimension of a head's first half with one of its second half.
        rope_factors: its graph takes a factor for each frequency (``rope_freqs.weight``).
        per_layer: ``deci`` computes the same where widths differ between layers.
        biases: projections whose bias its loader takes.
        square: its loader wants as many rows of q as the model is wide, which a model with fewer
            heads has not; llama's takes any number, and computes the same once rows are in its
            order.
    """

    name: str
    interleaved: bool = False
    rope_factors: bool = False
    per_layer: bool = False
    biases: tuple[str, ...] = ()
    square: bool = False


_LLAMA = Architecture(
    name="llama",
    interleaved=True,
    rope_factors=True,
    per_layer=True,
    biases=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
# config.model_type -> architecture. Written from llama.cpp's conversion (convert_hf_to_gguf.py).
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "qwen2": Architecture(name="qwen2", biases=("q_proj", "k_proj", "v_proj"), square=True),
        "qwen3": Architecture(name="qwen3"),
        "olmo2": Architecture(name="olmo2"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One model in the words of llama.cpp.

    Attributes:
        architecture: name of the GGUF architecture.
        interleaved: see :class:`Architecture`.
        heads: query heads of each layer.
        kv_heads: KV heads of each layer.
        channels: FFN channels of each layer.
        rope_base: the rotary embedding's theta.
        rope_factors: what each of its frequencies is divided by; None where none is changed.
        norm_epsilon: of RMSNorm.
    """

    architecture: str
    interleaved: bool
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    channels: tuple[int, ...]
    rope_base: float
    rope_factors: tuple[float, ...] | None
    norm_epsilon: float

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
    architecture = ARCHITECTURES[model_type]
    counts = KeepMask(spec.table).counts()
    alike = all(len(set(layers)) == 1 for layers in counts.values())
    rows = counts[ATTENTION][0] * spec.query_heads_per_group * spec.head_dim
    if architecture.square and not (alike and rows == spec.hidden):
        architecture = _LLAMA
    if not alike and not architecture.per_layer:
        raise UnsupportedModelError(
            f"{source}: the layers of this {model_type} differ in width, and llama.cpp's "
            f"{PER_LAYER_ARCHITECTURE!r} is the only architecture that allows that, but it does "
            "not compute this one; prune with --layout uniform or padded"
        )
    config = AutoConfig.for_model(**plain_values(spec))
    _require_known(config, spec, source)
    _require_biases(architecture, spec, source)
    base, factors = _rope(config, spec, source, allowed=architecture.rope_factors)
    return Shape(
        architecture=architecture.name if alike else PER_LAYER_ARCHITECTURE,
        interleaved=architecture.interleaved,
        heads=tuple(n * spec.query_heads_per_group for n in counts[ATTENTION]),
        kv_heads=tuple(counts[ATTENTION]),
        channels=tuple(counts[FFN]),
        rope_base=base,
        rope_factors=factors,
        norm_epsilon=float(config.rms_norm_eps),
    )


def _require_known(config: Any, spec: ModelSpec, source: str) -> None:
    """Refuse what changes the function and that llama.cpp's graph does not have."""
    if config.hidden_act != "silu":
        raise UnsupportedModelError(
            f"{source}: hidden_act is {config.hidden_act!r}; llama.cpp computes silu for this "
            "architecture"
        )
    window = getattr(config, "sliding_window", None)
    sliding = getattr(config, "use_sliding_window", True)
    if window is not None and sliding and window < spec.positions:
        raise UnsupportedModelError(
            f"{source}: sliding_window is {window}; llama.cpp computes full attention for this "
            f"architecture, another function beyond {window} tokens. For shorter texts alone, set "
            f"max_position_embeddings to {window} in config.json"
        )


def _require_biases(architecture: Architecture, spec: ModelSpec, source: str) -> None:
    """Refuse a bias that llama.cpp's loader would stumble over."""
    for layer, tensors in enumerate(spec.layer_tensors):
        for name in tensors:
            projection, _, kind = name.rpartition(".")
            if kind == "bias" and projection.rpartition(".")[2] not in architecture.biases:
                raise UnsupportedModelError(
                    f"{source}: the model has {spec.prefix(layer)}{name}, and llama.cpp's "
                    f"architecture {architecture.name!r} has no such bias"
                )


def _rope(
    config: Any, spec: ModelSpec, source: str, *, allowed: bool
) -> tuple[float, tuple[float, ...] | None]:
    """Theta, and what each frequency is divided by; transformers computes both."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    base, kind = float(rope["rope_theta"]), rope.get("rope_type", "default")
    if kind == "default":
        return base, None
    if kind not in ("linear", "llama3") or not allowed:
        can = "default, linear and llama3" if allowed else "the default alone"
        raise UnsupportedModelError(
            f"{source}: rope_type is {kind!r}; for this architecture {can} can be exported"
        )
    scaled, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    assert attention_factor == 1.0
    dimensions = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float()
    plain = 1.0 / base ** (dimensions / spec.head_dim)
    return base, tuple((plain / scaled).tolist())
