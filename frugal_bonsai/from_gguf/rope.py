"""Read rotary position embeddings from a GGUF file.

In: the metadata, and the small tensors of factors. Out: ``rope_parameters`` of transformers'
config, or an error that names what transformers would compute differently. The reverse of
:mod:`frugal_bonsai.export.rope`.
"""

from __future__ import annotations

import math
from typing import Any

from frugal_bonsai.checkpoint.gguf_header import GgufHeader
from frugal_bonsai.errors import UnsupportedModelError
from frugal_bonsai.export.architecture import Architecture
from frugal_bonsai.from_gguf.keys import Keys

FACTOR_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_BASE = 10_000.0  # of llama.cpp, where the file has none
# Llama 3.1 to 3.3: low_freq_factor, high_freq_factor, original_max_position_embeddings.
_LLAMA3 = (1.0, 4.0, 8192)


def read_rope(keys: Keys, architecture: Architecture, head_dim: int) -> dict[str, Any]:
    """Return the keys of the config that describe the rotary embedding.

    Raises:
        UnsupportedModelError: transformers, or this program, lacks the kind of scaling.
    """
    if architecture.rotates == "none":
        return {}
    path, rope = keys.header.path, _scaling(keys, architecture, head_dim)
    rope["rope_theta"] = float(keys.get("rope.freq_base", _BASE))
    dimensions = keys.get("rope.dimension_count", head_dim)
    if dimensions != head_dim:
        if architecture.rotates != "part":
            raise UnsupportedModelError(
                f"{path}: {dimensions} of the {head_dim} dimensions of a head are rotated; "
                f"{keys.architecture} rotates them all in transformers"
            )
        rope["partial_rotary_factor"] = dimensions / head_dim
    elif architecture.rotates == "part":
        rope["partial_rotary_factor"] = 1.0
    if architecture.name == "gemma3":
        local = float(keys.get("rope.freq_base_swa", _BASE))
        return {
            "rope_parameters": {
                "full_attention": rope,
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            }
        }
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        return {"rope_parameters": rope, "original_max_position_embeddings": original}
    return {"rope_parameters": rope}


def _scaling(keys: Keys, architecture: Architecture, head_dim: int) -> dict[str, Any]:
    """Return type and numbers of the scaling."""
    header, kind = keys.header, keys.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in header.tensors:
        factors = _read_vector(header, "rope_freqs.weight")
        base = float(keys.get("rope.freq_base", _BASE))
        dimensions = keys.get("rope.dimension_count", head_dim)
        return _llama3(keys, factors, base, dimensions)
    if "rope_factors_long.weight" in header.tensors:
        keys.get("rope.scaling.attn_factor")  # transformers computes it from the two lengths
        return {
            "rope_type": "longrope",
            "long_factor": _read_vector(header, "rope_factors_long.weight"),
            "short_factor": _read_vector(header, "rope_factors_short.weight"),
            "original_max_position_embeddings": keys.number("rope.scaling.original_context_length"),
        }
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0))
    if kind in ("none", "linear") and factor in (0.0, 1.0):
        return {"rope_type": "default"}
    if kind == "linear" and "linear" in architecture.rope_kinds:
        return {"rope_type": "linear", "factor": float(factor)}
    raise UnsupportedModelError(
        f"{header.path}: {keys.architecture}.rope.scaling.type is {kind!r} with the factor "
        f"{factor}, which is not read from GGUF files; use the original checkpoint"
    )


def _llama3(keys: Keys, factors: list[float], base: float, dimensions: int) -> dict[str, Any]:
    """Return the scaling of Llama 3 whose divisors of the frequencies the file has."""
    if all(value == 1.0 for value in factors):
        return {"rope_type": "default"}
    factor = float(round(max(factors)))
    low, high, original = _LLAMA3
    expected = []
    for at in range(0, dimensions, 2):
        wavelength = 2 * math.pi * base ** (at / dimensions)
        smooth = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        expected.append(1 / ((1 - smooth) / factor + smooth))
    alike = len(expected) == len(factors) and all(
        math.isclose(a, b, rel_tol=1e-3) for a, b in zip(expected, factors, strict=True)
    )
    if not alike:
        raise UnsupportedModelError(
            f"{keys.header.path}: rope_freqs.weight has other factors than Llama 3's scaling with "
            "an original context of 8192 tokens; use the original checkpoint"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _read_vector(header: GgufHeader, name: str) -> list[float]:
    """Return the values of a short fp32 tensor."""
    import numpy

    tensor = header.tensors[name]
    if tensor.kind != "F32" or len(tensor.shape) != 1:
        raise UnsupportedModelError(
            f"{header.path}: tensor {name!r} is {tensor.kind} {list(tensor.shape)}, expected a "
            "vector in F32"
        )
    values = numpy.fromfile(header.path, "<f4", tensor.shape[0], offset=tensor.start)
    return [float(str(value)) for value in values]
