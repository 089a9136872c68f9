"""Refitting the projection out of a sublayer: o_proj, down_proj.

In: a layer of both models, and for each micro-batch what the projection should give. Out: its new
weight, the share of the target's energy that it leaves, and where its inputs are found again.
Holds one Gram matrix, the cross moments that become the weight, and the inputs if asked to.

Shape suffixes: B windows of a micro-batch, S tokens, T tokens of a micro-batch, H hidden, C kept
columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from frugal_bonsai.accelerator import sum_dtype
from frugal_bonsai.bonsai.importance.gram import Moments, add_product_, ridge_refit_
from frugal_bonsai.bonsai.importance.scores import ImportanceBuilder
from frugal_bonsai.bonsai.reconstruction.layer_pass import InputsAgain, LayerPass
from frugal_bonsai.model.units import UnitGroup
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.micro_batch import memory_for

# For a micro-batch the target [B, S, H], its bias included, and what is to be kept once nothing can
# go wrong any more.
Target = Callable[[slice], tuple[torch.Tensor, Callable[[], None]]]


@dataclass(frozen=True)
class Solved:
    """A projection's refit.

    Attributes:
        weight_HC: fp32.
        left: share of the target's energy that it leaves.
        inputs: of the projection, as a function of a micro-batch.
    """

    weight_HC: torch.Tensor
    left: float
    inputs: Callable[[slice], torch.Tensor]


def solve_output(
    work: LayerPass,
    group: UnitGroup,
    windows: int,
    target: Target,
    *,
    ridge: float,
    keep: bool,
    prior: ImportanceBuilder | None = None,
    most_left: float = float("inf"),
    held_out: int = 0,
) -> Solved:
    """Accumulate the Gram matrix and the cross moments, then solve.

    Args:
        work: the layer of both models.
        group: whose output projection it is.
        windows: how many are in flight.
        target: of the projection.
        ridge: lambda as a share of the Gram matrix's mean diagonal.
        keep: hold the inputs; else they are computed again.
        prior: scores the group from the same moments, if less than ``most_left`` is left.
        most_left: what another refit leaves.
        held_out: windows behind these whose inputs are held too, if any are, but not learnt from.
    """
    weight_HC = work.pruned[f"{group.output}.weight"]
    bias_H = work.pruned.get(f"{group.output}.bias")
    columns, device = weight_HC.shape[1], weight_HC.device
    batches = work.sweep.batches
    with memory_for(f"recovery of {group.output_weight}"):
        moments = Moments(columns, device=device, gram=True)
        cross = Cross(weight_HC.shape[0], columns, device)
        kept = work.room(columns) if keep else None

        def add(items: slice) -> None:
            target_BSH, settle = target(items)
            if bias_H is not None:
                target_BSH = target_BSH - bias_H
            input_BSC = work.inputs(group.output, items)
            settle()
            if kept is not None:
                kept.write(items, input_BSC)
            batches.run(len(input_BSC), lambda part: moments.add(input_BSC[part]))
            batches.run(len(input_BSC), lambda part: cross.add(input_BSC[part], target_BSH[part]))

        batches.run(windows, add)
        if kept is not None:
            batches.run(held_out, partial(_keep, work, group, kept, windows))
        factor = moments.factor(ridge, where=f"recovery of {group.output_weight}")
        left = 1.0 - ridge_refit_(factor, cross.sum_HC, weight_HC) / max(cross.energy, 1e-300)
        if prior is not None and left < most_left:
            prior.add(group, moments, cross.sum_HC)
    inputs = kept.read if kept is not None else InputsAgain(work, group.output)
    return Solved(cross.sum_HC, left, inputs)


def _keep(work: LayerPass, group: UnitGroup, kept: HiddenStates, first: int, items: slice) -> None:
    """Hold the inputs of windows from the first one on."""
    behind = slice(items.start + first, items.stop + first)
    kept.write(behind, work.inputs(group.output, behind))


class Cross:
    """Running sums over tokens of ``t x^T`` and of the targets' energy."""

    def __init__(self, hidden: int, columns: int, device: torch.device) -> None:
        self.sum_HC = torch.zeros(hidden, columns, device=device)
        self._energy = torch.zeros((), dtype=sum_dtype(device), device=device)

    @property
    def energy(self) -> float:
        """Sum of the targets' squares; waits for the device."""
        return float(self._energy)

    def add(self, input_BSC: torch.Tensor, target_BSH: torch.Tensor) -> None:
        """Add one micro-batch: all of it, or nothing when memory runs out."""
        target_TH = target_BSH.flatten(0, 1)
        energy = torch.linalg.vector_norm(target_TH, dtype=self._energy.dtype).square()
        add_product_(self.sum_HC, target_TH, input_BSC.flatten(0, 1))
        self._energy += energy
