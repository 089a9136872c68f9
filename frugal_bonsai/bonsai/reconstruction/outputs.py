"""Refit the projection out of a sublayer: o_proj or down_proj.

In: a layer of both models, and for each micro-batch the output that the projection should have.
Out: its new weight, the share of the target's energy that the weight does not explain, and access
to the projection's inputs.

Memory: one Gram matrix, the cross moments that become the weight, and the inputs where requested.

Shape suffixes: B windows of a micro-batch, S tokens, H hidden, C remaining columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.reconstruction.layer_pass import Batch, LayerPass
from frugal_bonsai.bonsai.reconstruction.least_squares import LeastSquares
from frugal_bonsai.model.units import UnitGroup
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.micro_batch import memory_for

# Returns a micro-batch's target [B, S, H], bias included, and a function that stores by-products
# once nothing can run out of memory any more.
Target = Callable[[slice], tuple[torch.Tensor, Callable[[], None]]]


@dataclass(frozen=True)
class OutputRefit:
    """Refit of an output projection.

    Attributes:
        weight_HC: fp32.
        residual: share of the target's energy that the weight does not explain.
        inputs: the projection's inputs of a micro-batch.
    """

    weight_HC: torch.Tensor
    residual: float
    inputs: Batch


def refit_output(
    work: LayerPass,
    group: UnitGroup,
    target: Target,
    *,
    keep: bool,
    score_below: float = float("inf"),
) -> OutputRefit:
    """Sum the Gram matrix and the cross moments over the fitted windows, then solve.

    Args:
        work: the layer of both models.
        group: units of the output projection.
        target: of the projection.
        keep: hold the inputs of all windows; otherwise they are computed again when needed.
        score_below: score the group from these moments only if the residual is less than this.
    """
    weight_HC = work.pruned[f"{group.output}.weight"]
    bias_H = work.pruned.get(f"{group.output}.bias")
    where = f"reconstruction of {group.output_weight}"
    with memory_for(where):
        problem = LeastSquares(weight_HC)
        moments = problem.moments
        kept = work.pair.hidden_pruned.resident_like(weight_HC.shape[1]) if keep else None

        def add(items: slice) -> None:
            target_BSH, store = target(items)
            if bias_H is not None:
                target_BSH = target_BSH - bias_H
            input_BSC = work.inputs(group.output, items)
            store()
            if kept is not None:
                kept.write(items, input_BSC)
            windows = len(input_BSC)
            work.run(windows, lambda part: moments.add(input_BSC[part]))
            work.run(windows, lambda part: problem.add_targets(input_BSC[part], target_BSH[part]))

        work.run(work.pair.fitted, add)
        if kept is not None:
            _keep_held_out(work, group, kept)
        residual = problem.solve_(work.pair.options.ridge, where=where)
        if work.pair.scores is not None and residual < score_below:
            work.pair.scores.add(group, moments, problem.weight_HC)
    inputs = kept.read if kept is not None else work.recompute_inputs(group.output)
    return OutputRefit(problem.weight_HC, residual, inputs)


def _keep_held_out(work: LayerPass, group: UnitGroup, kept: HiddenStates) -> None:
    """Hold the inputs of the held-out windows too."""
    first = work.pair.fitted

    def body(items: slice) -> None:
        shifted = slice(items.start + first, items.stop + first)
        kept.write(shifted, work.inputs(group.output, shifted))

    work.run(work.pair.held_out, body)
