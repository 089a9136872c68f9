"""The trained parameters: LoRA adapters beside every block projection, or the projections.

In: a student whose weights are loaded, or the pruned checkpoint and the file of the best
parameters. Out: the trained parameters by name, in a fixed order; or for each trained projection a
function that returns its new weight, which the rewriter takes as a refitted projection. The
adapters are peft's (LoRA, Hu et al. 2021, section 4.1: W + (alpha / R) B A, with B = 0 at the
start). Their initial values come from a seeded generator, not from torch's global one. They are
added to the checkpoint's own weights, in whatever form the student held them. Holds the adapters,
or one weight, in fp32.

Shape suffixes: O output rows and I input columns of a projection, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from frugal_bonsai.adaptation.student import Student
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.tensor_file import open_tensors
from frugal_bonsai.int8 import has_bitsandbytes

Merged = dict[str, Callable[[], torch.Tensor]]
# Suffixes of the adapters' names, after the projection's name: A and B.
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
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
        parameters |= {bare + _DOWN: down.weight, bare + _UP: up.weight}
    return parameters


def trained_projections(student: Student) -> dict[str, nn.Parameter]:
    """Return the weights of all block projections of a student, fp32 ``[O, I]``."""
    return {name: module.weight for name, module in student.projection_modules()}


@contextmanager
def merged_weights(checkpoint: Checkpoint, file: Path, *, scaling: float) -> Iterator[Merged]:
    """Open the best parameters and yield the new weights.

    Args:
        checkpoint: the pruned model.
        file: parameters as ``TrainingFolder.save_best`` writes them.
        scaling: alpha / R; unused if the projections themselves were trained.

    Yields:
        Name of a weight -> a function that returns W + scaling * B A, or the trained weight, fp32
        ``[O, I]``. The functions work until the context ends.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    with open_tensors(file) as best:
        names = dict.fromkeys(_weight_of(name) for name in best.tensors)
        yield {name: partial(_merge, checkpoint, best, name, scaling) for name in names}


def _weight_of(parameter: str) -> str:
    """Return the name of the weight that a trained parameter changes."""
    for suffix in (_DOWN, _UP):
        if parameter.endswith(suffix):
            return parameter.removesuffix(suffix) + ".weight"
    return parameter


def _merge(checkpoint: Checkpoint, best: Checkpoint, name: str, scaling: float) -> torch.Tensor:
    """Return a projection's new weight, fp32 ``[O, I]``."""
    if name in best.tensors:
        return best.read(name)
    bare = name.removesuffix(".weight")
    up_OR, down_RI = best.read(bare + _UP), best.read(bare + _DOWN)
    return (up_OR @ down_RI).mul_(scaling).add_(checkpoint.read(name))
