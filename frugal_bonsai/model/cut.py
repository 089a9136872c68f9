"""Cut the removed units out of a tensor.

In: a tensor of the dense model, or its shape, and a keep mask. Out: the tensor without the rows and
columns of the removed units, or the indices that stay. The module reads no files. It holds the
tensor and its copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from frugal_bonsai.model.units import KeepMask, UnitGroup, UnitSlice, UnitTable

if TYPE_CHECKING:
    import torch

Pieces = Sequence[tuple[UnitGroup, UnitSlice]]
"""The groups that own parts of one tensor, each with the place of its units in that tensor."""

Refit = Mapping[str, "Callable[[], torch.Tensor]"]
"""Full name of a replaced tensor -> function that returns its new values, kept units only."""


def slices_by_tensor(table: UnitTable) -> dict[str, list[tuple[UnitGroup, UnitSlice]]]:
    """Return the :data:`Pieces` of every tensor that units own parts of, by full tensor name."""
    by_tensor: dict[str, list[tuple[UnitGroup, UnitSlice]]] = {}
    for group in table.groups:
        for piece in group.slices:
            by_tensor.setdefault(piece.tensor, []).append((group, piece))
    return by_tensor


def kept_indices(extent: int, pieces: Pieces, mask: KeepMask) -> torch.Tensor:
    """Return the indices (int64, ascending) of one dimension that no removed unit owns.

    Args:
        extent: length of the dimension in the dense tensor.
        pieces: places of units in this dimension.
        mask: the units kept.
    """
    import torch

    keep = torch.ones(extent, dtype=torch.bool)
    for group, piece in pieces:
        owned = piece.owned(mask.of(group))
        keep[piece.start : piece.start + len(owned)] = owned
    return keep.nonzero().flatten()


def cut_indices(
    shape: tuple[int, ...],
    pieces: Pieces,
    mask: KeepMask,
    padded: Mapping[str, int] | None = None,
) -> dict[int, torch.Tensor]:
    """Return the source index (int64) of every output index, for each dimension that changes.

    Args:
        shape: shape of the dense tensor.
        pieces: places of units in this tensor.
        mask: the units kept.
        padded: kind -> number of units with which each layer is stored: the kept units, then units
            of zeros. The index of a zero is -1. None stores the kept units only.
    """
    indices = {}
    for axis in sorted({piece.axis for _, piece in pieces}):
        on_axis = [(group, piece) for group, piece in pieces if piece.axis == axis]
        if padded is None:
            taken = kept_indices(shape[axis], on_axis, mask)
        else:
            taken = _padded_indices(shape[axis], on_axis, mask, padded)
        if len(taken) != shape[axis] or bool((taken < 0).any()):
            indices[axis] = taken
    return indices


def _padded_indices(
    extent: int, pieces: Pieces, mask: KeepMask, padded: Mapping[str, int]
) -> torch.Tensor:
    """Return the source index of every output index of one dimension; -1 stands for a zero."""
    import torch

    parts, at = [], 0
    for group, piece in sorted(pieces, key=lambda pair: pair[1].start):
        kept = mask.kept(group)
        owned = piece.owned(mask.of(group)).nonzero().flatten() + piece.start
        # An expert without any kept channel is removed, not padded.
        stored = padded[group.kind] if kept or group.expert is None else 0
        zeros = 0 if piece.joint else (stored - kept) * piece.width
        parts += [torch.arange(at, piece.start), owned, torch.full((zeros,), -1)]
        at = piece.start + (1 if piece.joint else group.count) * piece.width
    return torch.cat([*parts, torch.arange(at, extent)])


def cut_tensor(tensor: torch.Tensor, pieces: Pieces, mask: KeepMask) -> torch.Tensor:
    """Return the tensor without the rows and columns of the removed units, contiguous."""
    for axis, kept in cut_indices(tuple(tensor.shape), pieces, mask).items():
        tensor = tensor.index_select(axis, kept)
    return tensor.contiguous()


def cut_shape(shape: tuple[int, ...], pieces: Pieces, mask: KeepMask) -> tuple[int, ...]:
    """Return the shape of :func:`cut_tensor`'s result without making it."""
    extents = list(shape)
    for group, piece in pieces:
        kept = mask.kept(group)
        removed = int(not kept) if piece.joint else group.count - kept
        extents[piece.axis] -= removed * piece.width
    return tuple(extents)
