"""The trained parameters: LoRA adapters beside every block projection, or the projections.

In: a student whose weights are loaded. Out: its trained parameters by name, in a fixed order. The
adapters are peft's (LoRA, Hu et al. 2021, section 4.1: W + (alpha / R) B A, with B = 0 at the
start). Their initial values come from a seeded generator, not from torch's global one. merge.py
adds the adapters to the weights. Holds the adapters in fp32.

Shape suffixes: I input columns of a projection, R rank.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from frugal_bonsai.adapt.student import Student
from frugal_bonsai.int8 import has_bitsandbytes

# Suffixes of the adapters' names, after the projection's name: A and B.
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
_NAME = "default"  # peft's name of the adapter


def add_adapters(
    student: Student, *, rank: int, alpha: float, seed: int
) -> dict[str, nn.Parameter]:
    """Wrap every block projection of a student in a LoRA adapter.

    Args:
        student: its weights are loaded and frozen.
        rank: R.
        alpha: the product B A is scaled by alpha / R.
        seed: seeds the initial values of A, uniform in +-1 / sqrt(I).

    Returns:
        A and B of each projection, fp32 ``[R, I]`` and ``[O, R]``.
    """
    has_bitsandbytes()  # peft imports bitsandbytes too, whose warnings do not matter here
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(student.projections)
    )
    with torch.random.fork_rng(devices=[]):  # peft draws initial values, which are replaced below
        peft.inject_adapter_in_model(config, student.layers, adapter_name=_NAME)
    generator = torch.Generator().manual_seed(seed)
    parameters: dict[str, nn.Parameter] = {}
    for name, module in student.projection_modules():
        down, up = module.lora_A[_NAME], module.lora_B[_NAME]
        bound = 1.0 / math.sqrt(down.in_features)
        values_RI = torch.empty(down.weight.shape).uniform_(-bound, bound, generator=generator)
        down.weight = nn.Parameter(values_RI.to(student.device))
        up.weight = nn.Parameter(torch.zeros(up.weight.shape, device=student.device))
        bare = name.removesuffix(".weight")
        parameters |= {bare + DOWN: down.weight, bare + UP: up.weight}
    return parameters


def trained_projections(student: Student) -> dict[str, nn.Parameter]:
    """Return the weights of all block projections of a student, fp32 ``[O, I]``."""
    return {name: module.weight for name, module in student.projection_modules()}
