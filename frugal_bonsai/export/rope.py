"""Describe rotary position embeddings in llama.cpp's terms.

In: a config of transformers. Out: keys and tensors of a GGUF file, or an error where llama.cpp's
graph of the architecture rotates heads in another way. Reads no weights.
"""

from __future__ import annotations

from typing import Any

import gguf
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from frugal_bonsai.errors import UnsupportedModelError
from frugal_bonsai.export.architecture import ARCHITECTURES, Architecture
from frugal_bonsai.model.family import ModelSpec

Keys = dict[str, Any]  # names of methods of gguf.GGUFWriter -> what they are called with
Factors = dict[str, tuple[float, ...]]  # names of tensors -> divisors of the frequencies


def describe_rope(config: Any, spec: ModelSpec, architecture: Architecture) -> tuple[Keys, Factors]:
    """Return the keys and tensors of the rotary embedding; none where positions are learnt.

    Raises:
        UnsupportedModelError: llama.cpp lacks this kind for this architecture.
    """
    if architecture.rotates == "none":
        return {}, {}
    rope, keys = config.rope_parameters, {}
    if "full_attention" in rope:
        rope, local = rope["full_attention"], rope["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise UnsupportedModelError(
                f"rope_type of layers with a sliding window is {local['rope_type']!r}; "
                "llama.cpp supports 'default' there"
            )
        keys["add_rope_freq_base_swa"] = local["rope_theta"]
    dimensions = int(spec.head_dim * rope.get("partial_rotary_factor", 1.0))
    kind = rope.get("rope_type", "default")
    _require_known(kind, dimensions, spec, architecture)
    keys["add_rope_dimension_count"] = dimensions
    keys["add_rope_freq_base"] = rope["rope_theta"]
    if kind == "linear":
        keys["add_rope_scaling_type"] = gguf.RopeScalingType.LINEAR
        keys["add_rope_scaling_factor"] = rope["factor"]
    if kind == "llama3":
        return keys, {"rope_freqs": _llama3(config, rope["rope_theta"], dimensions)}
    if kind == "longrope":
        keys["add_rope_scaling_orig_ctx_len"] = rope["original_max_position_embeddings"]
        keys["add_rope_scaling_attn_factors"] = _scaled("longrope", config)[1]
        lengths = ("long", "short")
        return keys, {f"rope_factors_{name}": tuple(rope[f"{name}_factor"]) for name in lengths}
    return keys, {}


def _require_known(kind: str, dimensions: int, spec: ModelSpec, architecture: Architecture) -> None:
    """Raise for a scaling, or a number of rotated dimensions, that the graph does not have."""
    own, hint = ARCHITECTURES[spec.family.model_type], ""
    if architecture.name != own.name:
        hint = (
            f" ({own.name!r} takes no layers of these widths: prune FFN channels alone, "
            "with --method local-only, or --layout padded)"
        )
    if dimensions != spec.head_dim and architecture.rotates != "part":
        raise UnsupportedModelError(
            f"{dimensions} of the {spec.head_dim} dimensions of a head are rotated; "
            f"llama.cpp's architecture {architecture.name!r} rotates them all{hint}"
        )
    *rest, last = known = ("default", *architecture.rope_kinds)
    if kind not in known:
        raise UnsupportedModelError(
            f"rope_type is {kind!r}; for this architecture "
            f"{', '.join(rest)} and {last} can be exported{hint}"
        )


def _llama3(config: Any, base: float, dimensions: int) -> tuple[float, ...]:
    """Return the divisor of each frequency."""
    exponents = torch.arange(0, dimensions, 2, dtype=torch.int64).float() / dimensions
    return tuple((1.0 / base**exponents / _scaled("llama3", config)[0]).tolist())


def _scaled(kind: str, config: Any) -> tuple[Any, float]:
    """Return transformers' frequencies, and its factor of sines and cosines."""
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies, float(factor)
