"""The files of an adaptation: the teacher's answers, the training's state, the output.

In: shapes and sizes of the training. Out: a :class:`~frugal_bonsai.memory.disk.DiskPlan`. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from frugal_bonsai.memory.disk import CACHE, DiskPlan, ModelFiles, phase, tensor_files
from frugal_bonsai.memory.items import source_element_bytes
from frugal_bonsai.memory.training_items import moment_bytes
from frugal_bonsai.model.family import ModelSpec


def plan_training_disk(
    spec: ModelSpec,
    sizes: Sequence[int],
    *,
    optimiser: str,
    cache_bytes: int,
    sampled_tokens: int,
    companion_bytes: int,
) -> DiskPlan:
    """Predict the files of an adaptation.

    Args:
        spec: Shapes of the pruned model.
        sizes: Number of elements of each trained parameter.
        optimiser: The optimiser.
        cache_bytes: Bytes of the teacher's answers. 0 without.
        sampled_tokens: Number of tokens that are sampled from the teacher.
        companion_bytes: Bytes of the files that are copied beside the weights.
    """
    files = ModelFiles(spec, source_element_bytes(spec))
    best, count = 4 * sum(sizes), len(sizes)
    state = best + moment_bytes(sizes, optimiser)
    answers, formula = "tokens*(6*k + 4 + 2*H*layers)", "4 bytes a trained parameter"
    moments = f"{formula}, moments of {optimiser}"
    held = [
        tensor_files("teacher's answers", cache_bytes, 4, answers, folder=CACHE),
        tensor_files("sampled text", 8 * sampled_tokens, 1, "8*tokens", folder=CACHE),
        tensor_files("best parameters", best, count, formula),
        tensor_files("training state", state, 3 * count, moments),
    ]
    # The state is written beside the one that it replaces.
    name, formula = "training state that is replaced", "as the training state"
    replaced = tensor_files(name, state, 3 * count, formula)
    output = files.output(1.0, companion_bytes=companion_bytes)
    return DiskPlan(
        phases=(phase("training", [*held, replaced]), phase("writing the output", [*held, *output]))
    )
