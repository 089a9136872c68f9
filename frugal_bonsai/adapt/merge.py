"""What training makes of the weights, read from disk one at a time.

In: the pruned checkpoint and the best parameters' file. Out: for each projection a function that
gives its new weight: what the rewriter takes as refitted projections. Adapters are added to the
checkpoint's own weights, whatever the student computed with. Holds one weight in fp32.

Shape suffixes: O output rows and I input columns of a projection, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from frugal_bonsai.adapt.adapters import DOWN, UP
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.tensor_file import open_tensors

Merged = dict[str, Callable[[], torch.Tensor]]


@contextmanager
def merged_weights(checkpoint: Checkpoint, file: Path, *, scaling: float) -> Iterator[Merged]:
    """The new weights, while the file is open.

    Args:
        checkpoint: the pruned model.
        file: parameters as ``TrainingFolder.save_best`` writes them.
        scaling: alpha / R; of no effect where the weights themselves were trained.

    Yields:
        Weight's name -> a function that gives W + scaling * B A, or the trained weight itself,
        fp32 ``[O, I]``.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    with open_tensors(file) as best:
        names = dict.fromkeys(_weight(name) for name in best.tensors)
        yield {name: _merge(checkpoint, best, name, scaling) for name in names}


def _weight(name: str) -> str:
    """The weight that a parameter changes."""
    for ending in (DOWN, UP):
        if name.endswith(ending):
            return name.removesuffix(ending) + ".weight"
    return name


def _merge(
    checkpoint: Checkpoint, best: Checkpoint, name: str, scaling: float
) -> Callable[[], torch.Tensor]:
    def merge() -> torch.Tensor:
        if name in best.tensors:
            return best.read(name)
        bare = name.removesuffix(".weight")
        up_OR, down_RI = best.read(bare + UP), best.read(bare + DOWN)
        return (up_OR @ down_RI).mul_(scaling).add_(checkpoint.read(name))

    return merge
