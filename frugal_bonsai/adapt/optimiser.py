"""The optimiser of a training: AdamW, with moments in fp32 or in 8 bits.

In: parameters, its name. Out: torch's AdamW (Loshchilov and Hutter 2019) or bitsandbytes'
block-wise 8-bit one (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization), without
weight decay, and its state as tensors. Holds two moments: eight bytes an element, or two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from frugal_bonsai.errors import OptionError
from frugal_bonsai.int8 import has_bitsandbytes
from frugal_bonsai.memory.training_items import ADAMW, ADAMW_8BIT, EIGHT_BIT_LEAST

AUTO = "auto"
OPTIMISERS = (AUTO, ADAMW, ADAMW_8BIT)
BETAS = (0.9, 0.95)
# Of what an optimiser keeps of a parameter, what is the same for all of them, or counted elsewhere.
_SHARED = ("step", "qmap1", "qmap2")


def allowed_optimisers(asked: str) -> tuple[str, ...]:
    """What the plan may take, the preferred one first.

    Raises:
        OptionError: 8-bit moments without the bitsandbytes package.
    """
    if asked == ADAMW:
        return (ADAMW,)
    if has_bitsandbytes():
        return (ADAMW_8BIT,) if asked == ADAMW_8BIT else (ADAMW, ADAMW_8BIT)
    if asked == ADAMW_8BIT:
        raise OptionError(
            "--optimizer adamw8bit: needs the bitsandbytes package, which is not installed here or "
            "has no wheel for this platform; take --optimizer adamw"
        )
    return (ADAMW,)


def make_optimiser(
    name: str, parameters: Iterable[nn.Parameter], rate: float
) -> torch.optim.Optimizer:
    """One of :data:`ADAMW` and :data:`ADAMW_8BIT` over these parameters."""
    if name == ADAMW:
        return torch.optim.AdamW(list(parameters), lr=rate, betas=BETAS, weight_decay=0.0)
    from bitsandbytes.optim import AdamW8bit

    eight_bit: torch.optim.Optimizer = AdamW8bit(
        list(parameters),
        lr=rate,
        betas=BETAS,
        weight_decay=0.0,
        min_8bit_size=EIGHT_BIT_LEAST,
    )
    return eight_bit


def kept_state(optimiser: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """A parameter's moments and their scales; empty before the first step."""
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
    """Put back what :func:`kept_state` gave after so many steps."""
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
