"""The weights after training, computed one at a time.

In: the pruned checkpoint and the file of the best parameters. Out: for each trained projection, a
function that returns its new weight; the rewriter takes these as refitted projections. Adapters are
added to the checkpoint's own weights, in whatever form the student held them. Holds one weight in
fp32.

Shape suffixes: O output rows and I input columns of a projection, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from frugal_bonsai.adapt.adapters import DOWN, UP
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.tensor_file import open_tensors

Merged = dict[str, Callable[[], torch.Tensor]]


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
    for suffix in (DOWN, UP):
        if parameter.endswith(suffix):
            return parameter.removesuffix(suffix) + ".weight"
    return parameter


def _merge(checkpoint: Checkpoint, best: Checkpoint, name: str, scaling: float) -> torch.Tensor:
    """Return a projection's new weight, fp32 ``[O, I]``."""
    if name in best.tensors:
        return best.read(name)
    bare = name.removesuffix(".weight")
    up_OR, down_RI = best.read(bare + UP), best.read(bare + DOWN)
    return (up_OR @ down_RI).mul_(scaling).add_(checkpoint.read(name))
