"""Check that a tied head which is stored twice is stored equal.

In: an open checkpoint and its :class:`ModelSpec`. Out: nothing, or an error. Holds a few megabytes
of rows of the embedding and of the head.
"""

from __future__ import annotations

from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.model.family import ModelSpec

COMPARE_BYTES = 2**24  # bytes of each tensor that are compared at a time


def require_tied_head(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Refuse a tied model whose file holds a head that differs from the embedding.

    Raises:
        CheckpointError: the two tensors differ. transformers would load both and use both.
    """
    head, embedding = spec.family.head, spec.family.embedding
    if not spec.tied or head not in checkpoint.tensors:
        return
    if not _same_bytes(checkpoint, head, embedding):
        raise CheckpointError(
            f"{checkpoint.tensors[head].file}: tensor {head!r} differs from {embedding!r}, "
            "though config.json says tie_word_embeddings; set that to false to keep both"
        )


def _same_bytes(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Return whether two matrices are equal bit for bit."""
    import torch

    first, second = checkpoint.tensors[name], checkpoint.tensors[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    rows = first.shape[0]
    step = max(1, COMPARE_BYTES * rows // max(1, first.size_bytes))
    return all(
        torch.equal(
            checkpoint.read_rows(name, start, min(start + step, rows)).view(torch.uint8),
            checkpoint.read_rows(other, start, min(start + step, rows)).view(torch.uint8),
        )
        for start in range(0, rows, step)
    )
