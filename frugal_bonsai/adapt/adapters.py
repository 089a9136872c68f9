"""What is trained: low-rank adapters beside every block projection, or the projections themselves.

In: a student. Out: named parameters. Adapters are peft's (LoRA, Hu et al. 2021, section 4.1:
W + (alpha / R) B A, B zero at first); their first values come from a generator that is seeded here,
not from torch's own. Holds the adapters in fp32. What they make of the weights is merge.py's.

Shape suffixes: I input columns of a projection, R rank.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import nn

from frugal_bonsai.adapt.student import Student
from frugal_bonsai.errors import OptionError

LORA, FULL = "lora", "full"
METHODS = (LORA, FULL)
# Endings of the adapters' names, behind the projection's.
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
_NAME = "default"  # of the only adapter, in peft


class Adapters:
    """LoRA adapters of a student whose frozen weights are in place.

    Args:
        student: gets them.
        rank: R.
        alpha: the adapters' product counts alpha / R.
        seed: of A's first values.

    Raises:
        OptionError: no ``peft`` package.
    """

    def __init__(self, student: Student, *, rank: int, alpha: float, seed: int) -> None:
        peft = _import_peft()
        self._student = student
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(student.projections)
        )
        with torch.random.fork_rng(devices=[]):  # peft draws values that are replaced below
            peft.inject_adapter_in_model(config, student.layers, adapter_name=_NAME)
        generator = torch.Generator().manual_seed(seed)
        for _, module in self._modules():
            down, up = module.lora_A[_NAME], module.lora_B[_NAME]
            bound = 1.0 / math.sqrt(down.in_features)
            values_RI = torch.empty(down.weight.shape).uniform_(-bound, bound, generator=generator)
            down.weight = nn.Parameter(values_RI.to(student.device))
            up.weight = nn.Parameter(torch.zeros(up.weight.shape, device=student.device))

    def _modules(self) -> list[tuple[str, Any]]:
        """(name of the projection's weight in the checkpoint, peft's module), in order."""
        student = self._student
        return [
            (
                f"{student.spec.prefix(layer)}{path}.weight",
                student.layers[layer].get_submodule(path),
            )
            for layer in range(student.spec.layers)
            for path in student.projections
        ]

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name, in a fixed order."""
        named: dict[str, nn.Parameter] = {}
        for name, module in self._modules():
            bare = name.removesuffix(".weight")
            named[bare + DOWN] = module.lora_A[_NAME].weight
            named[bare + UP] = module.lora_B[_NAME].weight
        return named


class Projections:
    """All block projections of a student, trained themselves."""

    def __init__(self, student: Student) -> None:
        self._student = student

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name, in a fixed order."""
        student = self._student
        return {
            f"{student.spec.prefix(layer)}{path}.weight": student.layers[layer].get_parameter(
                f"{path}.weight"
            )
            for layer in range(student.spec.layers)
            for path in student.projections
        }


def _import_peft() -> ModuleType:
    from frugal_bonsai.int8 import has_bitsandbytes

    has_bitsandbytes()  # peft imports it too, and lets it warn of what nothing here needs
    try:
        import peft
    except ImportError as error:
        raise OptionError(
            "adapt --method lora needs the peft package: pip install 'frugal-bonsai[adapt]'; or "
            "take --method full"
        ) from error
    module: ModuleType = peft
    return module


def require_peft() -> None:
    """Refuse before any work where ``peft`` is missing.

    Raises:
        OptionError: it is.
    """
    _import_peft()
