"""The files of an adaptation: the teacher's answers, the training's state, the output.

In: shapes and sizes of the training. Out: a :class:`~frugal_bonsai.memory.disk.DiskPlan`. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from frugal_bonsai.memory.disk import (
    CACHE,
    DiskItem,
    DiskPlan,
    ModelFiles,
    file_bytes,
    phase,
)
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
    best, state = 4 * sum(sizes), 4 * sum(sizes) + moment_bytes(sizes, optimiser)
    formula = "4 bytes a trained parameter"
    held = [
        DiskItem(
            name="teacher's answers",
            size_bytes=cache_bytes and file_bytes(cache_bytes, 4),
            formula="tokens*(6*k + 4 + 2*H*layers)",
            folder=CACHE,
        ),
        DiskItem(
            name="sampled text",
            size_bytes=sampled_tokens and file_bytes(8 * sampled_tokens, 1),
            formula="8*tokens",
            folder=CACHE,
        ),
        DiskItem(name="best parameters", size_bytes=file_bytes(best, len(sizes)), formula=formula),
        DiskItem(
            name="training state",
            size_bytes=file_bytes(state, 3 * len(sizes)),
            formula=f"{formula}, moments of {optimiser}",
        ),
    ]
    # The state is written beside the one that it replaces.
    replaced = DiskItem(
        name="training state that is replaced",
        size_bytes=file_bytes(state, 3 * len(sizes)),
        formula="as the training state",
    )
    output = files.output(1.0, companion_bytes=companion_bytes)
    return DiskPlan(
        phases=(phase("training", [*held, replaced]), phase("writing the output", [*held, *output]))
    )
