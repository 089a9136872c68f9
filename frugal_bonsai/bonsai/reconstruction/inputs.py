"""Refit the projections into a sublayer: q, k, v, gate and up.

In: a layer of both models before one of its sublayers runs. Out: new weights of the sublayer's
input projections. Pruning makes the residual stream drift, and with it the inputs of these
projections. With X the pruned model's inputs, N the dense model's and W_d the dense weight's
remaining rows,

    W' = argmin ||N W_d^T - X W'^T||^2 + lambda ||W' - W||^2 ,

so that a projection returns on the drifted input what the dense projection returns on its own. The
targets are linear in N, so only N^T X is summed: no projection is computed for it, and the sweep
spends no more tokens.

Memory: two ``[H, H]`` matrices.

Shape suffixes: H hidden, R remaining rows of a projection, B windows of a micro-batch, S tokens.
"""

from __future__ import annotations

import torch

from frugal_bonsai.accelerator import to_device
from frugal_bonsai.bonsai.importance.factor import BLOCK
from frugal_bonsai.bonsai.importance.gram import Moments, add_product_
from frugal_bonsai.bonsai.reconstruction.input_rows import input_projections
from frugal_bonsai.bonsai.reconstruction.layer_pass import LayerPass
from frugal_bonsai.bonsai.reconstruction.least_squares import ridge_refit_
from frugal_bonsai.model.cut import kept_indices
from frugal_bonsai.model.units import UnitGroup
from frugal_bonsai.stream.call import capture_input


def refit_inputs(work: LayerPass, group: UnitGroup, *, first: bool) -> None:
    """Refit a group's input projections; the layer computes with them from then on.

    Args:
        work: the layer of both models.
        group: units of the next sublayer.
        first: True for the layer's first sublayer; the dense inputs of the last one were stored.
    """
    options = work.pair.options
    assert options.mask is not None
    projections = input_projections(work.spec, group)
    if not projections:
        return  # of attention that is one unit, the output projection alone is known
    hidden = work.pruned[f"{projections[0]}.weight"].shape[1]
    moments = Moments(hidden, device=work.device, gram=True)
    cross_HH = torch.zeros(hidden, hidden, device=work.device)  # N^T X

    def add(items: slice) -> None:
        input_BSH = work.inputs(projections[0], items)
        dense_BSH = _dense_input(work, projections[0], items, first=first)
        work.run(len(input_BSH), lambda part: moments.add(input_BSH[part]))
        work.run(
            len(input_BSH),
            lambda part: add_product_(
                cross_HH, dense_BSH[part].flatten(0, 1), input_BSH[part].flatten(0, 1)
            ),
        )

    work.run(work.pair.fitted, add)
    for projection in projections:
        name = f"{projection}.weight"
        full = work.spec.prefix(work.layer) + name
        pieces = [(group, piece) for piece in group.slices if piece.tensor == full]
        dense_RH = work.dense[name]
        rows = to_device(kept_indices(len(dense_RH), pieces, options.mask), work.device)
        factor = moments.factor(options.ridge, where=f"reconstruction of {full}")
        weight_RH = _rows_times(dense_RH, rows, cross_HH)
        ridge_refit_(factor, weight_RH, work.pruned[name])
        work.adopt(name, weight_RH)


def _dense_input(work: LayerPass, projection: str, items: slice, *, first: bool) -> torch.Tensor:
    """Return the dense model's input of a projection, ``[B, S, H]``."""
    if first:
        hidden_BSH = work.pair.hidden_dense.read(items)
        return capture_input(work.module, work.dense, hidden_BSH, work.kwargs, projection)
    assert work.pair.dense_inputs is not None
    return work.pair.dense_inputs.read(items)


def _rows_times(
    weight_RH: torch.Tensor, rows: torch.Tensor, right_HH: torch.Tensor
) -> torch.Tensor:
    """Multiply some rows of a weight with a matrix in fp32, copying only a block of these rows."""
    product_RH = torch.empty(len(rows), right_HH.shape[1], device=right_HH.device)
    for start in range(0, len(rows), BLOCK):
        some = slice(start, start + BLOCK)
        torch.mm(weight_RH[rows[some]].float(), right_HH, out=product_RH[some])
    return product_RH
