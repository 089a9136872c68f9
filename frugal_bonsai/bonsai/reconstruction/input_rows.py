"""Rows of the projections into a sublayer that a group's units own.

In: a model's description and a group. Out: module names and their parts. Holds names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import UnitGroup


@dataclass(frozen=True)
class Rows:
    """One kind of row in an input projection: all of ``up_proj``, or half of a fused ``gate_up``.

    Attributes:
        projection: module inside the layer.
        part: index of the part that these rows are.
        parts: number of equal parts that the projection has.
    """

    projection: str
    part: int
    parts: int

    def take(self, value: torch.Tensor) -> torch.Tensor:
        """Return these rows of the projection's weight or bias, a view."""
        return value.chunk(self.parts)[self.part]


def input_rows(spec: ModelSpec, group: UnitGroup) -> list[Rows]:
    """Return the rows that a group's units own, one entry for each kind of row."""
    prefix, shapes = spec.prefix(group.layer), spec.layer_tensors[group.layer]
    names = [piece.tensor.removeprefix(prefix) for piece in group.slices if piece.axis == 0]
    names = [name for name in names if len(shapes[name]) == 2]
    return [
        Rows(name.removesuffix(".weight"), names[:index].count(name), names.count(name))
        for index, name in enumerate(names)
    ]


def input_projections(spec: ModelSpec, group: UnitGroup) -> list[str]:
    """Return the modules whose output rows a group's units own; they share one input."""
    return list(dict.fromkeys(rows.projection for rows in input_rows(spec, group)))
