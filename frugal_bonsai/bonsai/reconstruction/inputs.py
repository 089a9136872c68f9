"""Refitting the projections into a sublayer: q, k, v, gate and up.

In: a layer of both models before one of its sublayers runs. Out: new weights for the sublayer's
input projections. Pruning makes the residual stream drift, and with it what these projections read.
With X the pruned model's input to them, N the dense model's, W_d the dense weight's kept rows,

    W' = argmin ||N W_d^T - X W'^T||^2 + lambda ||W' - W||^2 ,

so that they give on the drifted input what the dense ones give on the true one. The targets are
linear in N, hence N^T X is all that has to be summed: no projection is computed for it, and the
sweep spends no more tokens. Holds two ``[H, H]`` matrices.

Shape suffixes: H hidden, R kept rows of a projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from frugal_bonsai.accelerator import to_device
from frugal_bonsai.bonsai.importance.factor import BLOCK
from frugal_bonsai.bonsai.importance.gram import Moments, add_product_, ridge_refit_
from frugal_bonsai.bonsai.reconstruction.layer_pass import LayerPass
from frugal_bonsai.model.cut import kept_indices
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import KeepMask, UnitGroup
from frugal_bonsai.stream.call import capture_input


def input_projections(spec: ModelSpec, group: UnitGroup) -> list[str]:
    """Modules inside the layer whose output rows the group's units own, all of one input."""
    prefix, shapes = spec.prefix(group.layer), spec.layer_tensors[group.layer]
    found = [piece.tensor.removeprefix(prefix) for piece in group.slices if piece.axis == 0]
    names = dict.fromkeys(found)  # a fused one has several pieces
    return [name.removesuffix(".weight") for name in names if len(shapes[name]) == 2]


@dataclass(frozen=True)
class Rows:
    """The rows of one kind in a projection into the FFN: all of ``up_proj``, half of ``gate_up``.

    Attributes:
        projection: module inside the layer.
        at: which of its parts these rows are.
        of: how many parts of one size it has.
    """

    projection: str
    at: int
    of: int

    def take(self, value: torch.Tensor) -> torch.Tensor:
        """These rows of the projection's weight or bias, a view."""
        return value.chunk(self.of)[self.at]


def input_rows(spec: ModelSpec, group: UnitGroup) -> list[Rows]:
    """The rows that a group's units own, one entry a kind of row."""
    prefix, shapes = spec.prefix(group.layer), spec.layer_tensors[group.layer]
    names = [piece.tensor.removeprefix(prefix) for piece in group.slices if piece.axis == 0]
    names = [name for name in names if len(shapes[name]) == 2]
    return [
        Rows(name.removesuffix(".weight"), names[:index].count(name), names.count(name))
        for index, name in enumerate(names)
    ]


def refit_inputs(
    work: LayerPass,
    group: UnitGroup,
    mask: KeepMask,
    windows: int,
    *,
    ridge: float,
    first: bool,
) -> dict[str, torch.Tensor]:
    """Refit a group's input projections; the layer pass computes with them from then on.

    Args:
        work: the layer of both models.
        group: whose sublayer comes next.
        mask: the kept units, which are the pruned projections' rows.
        windows: how many are in flight.
        ridge: lambda as a share of the mean diagonal.
        first: the group's sublayer is the layer's first; else the dense inputs are those that the
            layer pass kept.

    Returns:
        Full tensor name -> new weight ``[R, H]``, fp32.
    """
    spec = work.sweep.skeleton.spec
    projections = input_projections(spec, group)
    hidden = work.pruned[f"{projections[0]}.weight"].shape[1]
    device = work.sweep.skeleton.device
    moments = Moments(hidden, device=device, gram=True)
    cross_HH = torch.zeros(hidden, hidden, device=device)  # N^T X
    batches = work.sweep.batches

    def add(items: slice) -> None:
        input_BSH = work.inputs(projections[0], items)
        dense_BSH = _dense_input(work, projections[0], items, first=first)
        batches.run(len(input_BSH), lambda part: moments.add(input_BSH[part]))
        batches.run(
            len(input_BSH),
            lambda part: add_product_(
                cross_HH, dense_BSH[part].flatten(0, 1), input_BSH[part].flatten(0, 1)
            ),
        )

    batches.run(windows, add)
    refits = {}
    for projection in projections:
        name = f"{projection}.weight"
        full = spec.prefix(work.layer) + name
        pieces = [(group, piece) for piece in group.slices if piece.tensor == full]
        dense_RH = work.dense[name]
        rows = to_device(kept_indices(len(dense_RH), pieces, mask), device)
        factor = moments.factor(ridge, where=f"recovery of {full}")
        weight_RH = _rows_times(dense_RH, rows, cross_HH)
        ridge_refit_(factor, weight_RH, work.pruned[name])
        refits[full] = work.adopt(name, weight_RH)
    return refits


def _rows_times(
    weight_RH: torch.Tensor, rows: torch.Tensor, right_HH: torch.Tensor
) -> torch.Tensor:
    """Some rows of a weight times a matrix, fp32, without a copy of all these rows."""
    product_RH = torch.empty(len(rows), right_HH.shape[1], device=right_HH.device)
    for start in range(0, len(rows), BLOCK):
        some = slice(start, start + BLOCK)
        torch.mm(weight_RH[rows[some]].float(), right_HH, out=product_RH[some])
    return product_RH


def _dense_input(work: LayerPass, projection: str, items: slice, *, first: bool) -> torch.Tensor:
    """The dense model's input of a projection, ``[B, S, H]``."""
    if first:
        hidden_BSH = work.hidden_dense.read(items)
        return capture_input(work.module, work.dense, hidden_BSH, work.kwargs, projection)
    assert work.dense_inputs is not None
    return work.dense_inputs.read(items)
