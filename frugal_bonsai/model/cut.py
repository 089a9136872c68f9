"""Cutting the removed units out of one tensor.

In: a tensor of the dense model and a keep mask. Out: the tensor without the rows or columns that
the removed units own. Holds the tensor and its copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from frugal_bonsai.model.units import KeepMask, UnitGroup, UnitSlice, UnitTable

if TYPE_CHECKING:
    import torch


def slices_by_tensor(table: UnitTable) -> dict[str, list[tuple[UnitGroup, UnitSlice]]]:
    """For each tensor that units own parts of: the groups and where their units sit in it."""
    by_tensor: dict[str, list[tuple[UnitGroup, UnitSlice]]] = {}
    for group in table.groups:
        for piece in group.slices:
            by_tensor.setdefault(piece.tensor, []).append((group, piece))
    return by_tensor


def kept_indices(
    extent: int, pieces: list[tuple[UnitGroup, UnitSlice]], mask: KeepMask
) -> torch.Tensor:
    """Indices (int64) of one dimension that stay: all but those that removed units own."""
    import torch

    keep = torch.ones(extent, dtype=torch.bool)
    for group, piece in pieces:
        owned = piece.owned(mask.of(group))
        keep[piece.start : piece.start + len(owned)] = owned
    return keep.nonzero().flatten()


def padded_indices(
    extent: int,
    pieces: list[tuple[UnitGroup, UnitSlice]],
    mask: KeepMask,
    padded: Mapping[str, int] | None,
) -> torch.Tensor:
    """Indices (int64) of one dimension of the output; -1 is a place that zeros fill.

    Args:
        extent: of the dimension in the dense tensor.
        pieces: where units sit in this dimension.
        mask: the units kept.
        padded: units of each kind that a layer is stored with, the kept ones first; None stores
            the kept ones alone.
    """
    import torch

    if padded is None:
        return kept_indices(extent, pieces, mask)
    parts, at = [], 0
    for group, piece in sorted(pieces, key=lambda pair: pair[1].start):
        owned = piece.owned(mask.of(group)).nonzero().flatten() + piece.start
        # An expert that is gone is not filled up.
        stored = padded[group.kind] if mask.kept(group) or group.expert is None else 0
        zeros = 0 if piece.joint else (stored - mask.kept(group)) * piece.width
        parts += [torch.arange(at, piece.start), owned, torch.full((zeros,), -1)]
        at = piece.start + (1 if piece.joint else group.count) * piece.width
    return torch.cat([*parts, torch.arange(at, extent)])


def cut_tensor(
    tensor: torch.Tensor, pieces: list[tuple[UnitGroup, UnitSlice]], mask: KeepMask
) -> torch.Tensor:
    """The tensor without its removed units' rows and columns, contiguous."""
    for axis in sorted({piece.axis for _, piece in pieces}):
        on_axis = [(group, piece) for group, piece in pieces if piece.axis == axis]
        keep = kept_indices(tensor.shape[axis], on_axis, mask)
        if len(keep) < tensor.shape[axis]:
            tensor = tensor.index_select(axis, keep)
    return tensor.contiguous()


def cut_shape(
    shape: tuple[int, ...],
    pieces: list[tuple[UnitGroup, UnitSlice]],
    mask: KeepMask,
    padded: Mapping[str, int] | None = None,
) -> tuple[int, ...]:
    """The shape that the cut gives, without the tensor; see :func:`padded_indices`."""
    extents = list(shape)
    for group, piece in pieces:
        kept = mask.kept(group)
        stored = (
            kept
            if padded is None or (group.expert is not None and not kept)
            else padded[group.kind]
        )
        gone = int(not kept) if piece.joint else group.count - stored
        extents[piece.axis] -= gone * piece.width
    return tuple(extents)
