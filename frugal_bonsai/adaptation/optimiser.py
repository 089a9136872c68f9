"""The optimiser: AdamW with moments in fp32 or in 8 bits.

In: parameters and a name. Out: torch's AdamW (Loshchilov and Hutter 2019) or the block-wise 8-bit
AdamW of bitsandbytes (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization), both
without weight decay; and its state as tensors. Holds two moments: 8 bytes an element, or 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from frugal_bonsai.errors import OptionError
from frugal_bonsai.int8 import has_bitsandbytes
from frugal_bonsai.memory.training_items import ADAMW, ADAMW_8BIT, EIGHT_BIT_LEAST

BETAS = (0.9, 0.95)
# Entries of a parameter's state that are not saved: shared by all parameters, or saved elsewhere.
_SHARED = ("step", "qmap1", "qmap2")


def allowed_optimisers(asked: str) -> tuple[str, ...]:
    """Return the optimisers that the plan may choose from, the preferred one first.

    Raises:
        OptionError: 8-bit moments were asked for, and bitsandbytes is missing.
    """
    if asked == ADAMW:
        return (ADAMW,)
    if has_bitsandbytes():
        return (ADAMW_8BIT,) if asked == ADAMW_8BIT else (ADAMW, ADAMW_8BIT)
    if asked == ADAMW_8BIT:
        raise OptionError(
            "--optimizer adamw8bit: needs the bitsandbytes package, which is not installed here or "
            "has no wheel for this platform; choose --optimizer adamw"
        )
    return (ADAMW,)


def make_optimiser(
    name: str, parameters: Iterable[nn.Parameter], rate: float
) -> torch.optim.Optimizer:
    """Return :data:`ADAMW` or :data:`ADAMW_8BIT` over these parameters."""
    if name == ADAMW:
        return torch.optim.AdamW(list(parameters), lr=rate, betas=BETAS, weight_decay=0.0)
    from bitsandbytes.optim import AdamW8bit

    eight_bit: torch.optim.Optimizer = AdamW8bit(
        list(parameters), lr=rate, betas=BETAS, weight_decay=0.0, min_8bit_size=EIGHT_BIT_LEAST
    )
    return eight_bit


def kept_state(optimiser: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """Return a parameter's moments and their scales; nothing before the first step."""
    state = optimiser.state.get(parameter, {})
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name not in _SHARED
    }


def restore_state(
    optimiser: torch.optim.Optimizer,
    parameter: nn.Parameter,
    kept: Mapping[str, torch.Tensor],
    step: int,
) -> None:
    """Restore what :func:`kept_state` returned after this many steps."""
    values: dict[str, Any] = {name: value.to(parameter.device) for name, value in kept.items()}
    if isinstance(optimiser, torch.optim.AdamW):
        optimiser.state[parameter] = {"step": torch.tensor(float(step)), **values}
        return
    maps = optimiser.name2qmap  # type: ignore[attr-defined]
    for name, which in (("qmap1", "dynamic"), ("qmap2", "udynamic")):
        if "absmax1" in values:
            maps[which] = maps[which].to(parameter.device)
            values[name] = maps[which]
    optimiser.state[parameter] = {"step": step, **values}
