"""Refitting the projections into a sublayer: q, k, v, gate and up.

In: a layer of both models before one of its sublayers runs. Out: new weights for the sublayer's
input projections. Pruning makes the residual stream drift, and with it what these projections read.
With X the pruned model's input to them, N the dense model's, W_d the dense weight's kept rows,

    W' = argmin ||N W_d^T - X W'^T||^2 + lambda ||W' - W||^2 ,

so that they give on the drifted input what the dense ones give on the true one. The targets are
linear in N, hence X^T N is all that has to be summed: no projection is computed for it, and the
sweep spends no more tokens. Holds two ``[H, H]`` matrices.

Shape suffixes: H hidden, R kept rows of a projection.
"""

from __future__ import annotations

import torch

from frugal_bonsai.bonsai.gram import ridge_refit
from frugal_bonsai.bonsai.layer_pass import LayerPass
from frugal_bonsai.model.cut import kept_indices
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import KeepMask, UnitGroup
from frugal_bonsai.stream.call import capture_input


def input_projections(spec: ModelSpec, group: UnitGroup) -> list[str]:
    """Modules inside the layer whose output rows the group's units own, all of one input."""
    prefix, shapes = spec.prefix(group.layer), spec.layer_tensors[group.layer]
    names = [piece.tensor.removeprefix(prefix) for piece in group.slices if piece.axis == 0]
    return [name.removesuffix(".weight") for name in names if len(shapes[name]) == 2]


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
    gram_HH, cross_HH = (torch.zeros(hidden, hidden, device=device) for _ in range(2))

    batches = work.sweep.batches

    def add(items: slice) -> None:
        input_BSH = work.inputs(projections[0], items)
        dense_BSH = _dense_input(work, projections[0], items, first=first)
        batches.run(len(input_BSH), lambda part: _add_product(gram_HH, input_BSH[part]))
        batches.run(
            len(input_BSH), lambda part: _add_product(cross_HH, input_BSH[part], dense_BSH[part])
        )

    batches.run(windows, add)
    refits = {}
    for projection in projections:
        name = f"{projection}.weight"
        full = spec.prefix(work.layer) + name
        piece = next(piece for piece in group.slices if piece.tensor == full)
        dense_RH = work.dense[name]
        rows = kept_indices(len(dense_RH), [(group, piece)], mask).to(device)
        weight_RH = ridge_refit(
            gram_HH,
            cross_HH @ dense_RH[rows].float().T,
            work.pruned[name],
            ridge=ridge,
            where=f"recovery of {full}",
        )
        refits[full] = weight_RH
        work.pruned[name] = weight_RH.to(work.sweep.skeleton.dtype)
    return refits


def _add_product(
    sum_HH: torch.Tensor, input_BSH: torch.Tensor, other_BSH: torch.Tensor | None = None
) -> None:
    """Add X^T Y over tokens, or X^T X."""
    input_TH = input_BSH.flatten(0, 1).float()
    other_TH = input_TH if other_BSH is None else other_BSH.flatten(0, 1).float()
    sum_HH.addmm_(input_TH.T, other_TH)


def _dense_input(work: LayerPass, projection: str, items: slice, *, first: bool) -> torch.Tensor:
    """The dense model's input of a projection, ``[B, S, H]``."""
    if first:
        hidden_BSH = work.hidden_dense.read(items)
        return capture_input(work.module, work.dense, hidden_BSH, work.kwargs, projection)
    assert work.dense_inputs is not None
    return work.dense_inputs.read(items)
