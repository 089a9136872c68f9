"""Rotary embeddings in llama.cpp's words.

In: a config as transformers makes it. Out: :class:`Rope`, or an error where llama.cpp's graph of
the architecture turns heads otherwise. Reads no weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from frugal_bonsai.errors import UnsupportedModelError
from frugal_bonsai.export.architecture import ARCHITECTURES, Architecture
from frugal_bonsai.model.family import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Rope:
    """How a model's heads are turned by the position.

    Attributes:
        base: theta; of the layers with full attention where there are others.
        local_base: theta of layers with a sliding window; None where it is the same.
        dimensions: of a head that turn, the first ones.
        scale: what positions are divided by in the layers of ``base``; 1.0 leaves them.
        factors: tensor name -> what each frequency is divided by; one for any text, or one for
            texts within ``original_positions`` and one beyond.
        attention_factor: what sines and cosines are multiplied by; 1.0 leaves them.
        original_positions: see ``factors``; None without.
    """

    base: float
    local_base: float | None = None
    dimensions: int
    scale: float = 1.0
    factors: dict[str, tuple[float, ...]] = field(default_factory=dict)
    attention_factor: float = 1.0
    original_positions: int | None = None


def describe_rope(
    config: Any, spec: ModelSpec, architecture: Architecture, source: str
) -> Rope | None:
    """The rotary embedding; None where positions are learnt.

    Raises:
        UnsupportedModelError: a kind that llama.cpp does not have for this architecture.
    """
    if architecture.rotates == "none":
        return None
    rope, local = config.rope_parameters, None
    if "full_attention" in rope:
        rope, local = rope["full_attention"], rope["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise UnsupportedModelError(
                f"{source}: rope_type of layers with a sliding window is {local['rope_type']!r}; "
                "llama.cpp takes the default alone"
            )
    dimensions = int(spec.head_dim * rope.get("partial_rotary_factor", 1.0))
    own = ARCHITECTURES[spec.family.model_type]
    hint = ""
    if architecture is not own:
        hint = (
            f" ({own.name!r} takes no layers of these widths: prune FFN channels alone, "
            "with --method local-only, or --layout padded)"
        )
    if dimensions != spec.head_dim and architecture.rotates != "part":
        raise UnsupportedModelError(
            f"{source}: {dimensions} of the {spec.head_dim} dimensions of a head are rotated; "
            f"llama.cpp's architecture {architecture.name!r} rotates them all{hint}"
        )
    kind = rope.get("rope_type", "default")
    if kind not in ("default", *architecture.rope_kinds):
        *rest, last = ("default", *architecture.rope_kinds)
        raise UnsupportedModelError(
            f"{source}: rope_type is {kind!r}; for this architecture "
            f"{', '.join(rest)} and {last} can be exported{hint}"
        )
    base = float(rope["rope_theta"])
    same: dict[str, Any] = {
        "base": base,
        "local_base": None if local is None else float(local["rope_theta"]),
        "dimensions": dimensions,
    }
    if kind == "linear":
        return Rope(**same, scale=float(rope["factor"]))
    if kind == "llama3":
        return Rope(**same, factors={"rope_freqs": _llama3(config, base, dimensions)})
    if kind == "longrope":
        return _longrope(config, same)
    return Rope(**same)


def _llama3(config: Any, base: float, dimensions: int) -> tuple[float, ...]:
    """What each frequency is divided by; transformers computes the frequencies."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert attention_factor == 1.0
    exponents = torch.arange(0, dimensions, 2, dtype=torch.int64).float() / dimensions
    return tuple((1.0 / base**exponents / scaled).tolist())


def _longrope(config: Any, same: dict[str, Any]) -> Rope:
    """Two sets of factors; transformers computes what sines and cosines are multiplied by."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    _, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    rope = config.rope_parameters
    return Rope(
        **same,
        factors={
            "rope_factors_long": tuple(map(float, rope["long_factor"])),
            "rope_factors_short": tuple(map(float, rope["short_factor"])),
        },
        attention_factor=float(attention_factor),
        original_positions=int(rope["original_max_position_embeddings"]),
    )
