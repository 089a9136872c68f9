"""The inputs of the output projections during a sweep: masked, imputed, shown to a tap.

In: a layer's groups, the keep masks of a micro-batch, a tap. Out: hooks for the layer's call. Holds
the inputs of one layer for one micro-batch, until the tap has seen them.

Shape suffixes: B pairs of a micro-batch, S tokens, C columns of an output projection, P columns
that may be imputed.
"""

from __future__ import annotations

from typing import Protocol

import torch

from frugal_bonsai.accelerator import to_device
from frugal_bonsai.model.units import UnitGroup
from frugal_bonsai.stream.call import InputHook
from frugal_bonsai.stream.layers import Parameters
from frugal_bonsai.stream.micro_batch import MicroBatches


class Masker(Protocol):
    """Gives the kept columns of each (mask, window) pair."""

    def columns(self, group: UnitGroup, items: slice) -> torch.Tensor | None:
        """Return bool ``[B, C]`` over the columns of the streamed layer; None keeps all."""

    def impute(
        self, group: UnitGroup, input_BSC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return all removable columns ``[P]``, imputed ``[B, S, P]``; None imputes zeros."""


class Tap(Protocol):
    """Sees the inputs of the output projections, and the end of each layer."""

    def inputs(self, group: UnitGroup, input_BSC: torch.Tensor) -> None:
        """Take one micro-batch's input of an output projection, in the compute dtype.

        When memory runs out it is called again with parts of the micro-batch, so it must allocate
        all that it needs before it changes anything.
        """

    def end_layer(self, layer: int, parameters: Parameters) -> None:
        """Finish a layer that all windows have passed; its parameters are still valid."""


def make_hooks(
    groups: tuple[UnitGroup, ...], masker: Masker | None, tap: Tap | None, items: slice
) -> tuple[dict[str, InputHook], list[tuple[UnitGroup, torch.Tensor]]]:
    """Make hooks that mask the inputs and keep them for the tap until the layer has succeeded."""
    hooks: dict[str, InputHook] = {}
    seen: list[tuple[UnitGroup, torch.Tensor]] = []

    def make(group: UnitGroup, keep_BC: torch.Tensor | None) -> InputHook:
        def hook(input_BSC: torch.Tensor) -> torch.Tensor | None:
            if keep_BC is not None and masker is not None:
                _mask(masker, group, to_device(keep_BC, input_BSC.device), input_BSC)
            if tap is not None:
                seen.append((group, input_BSC))
            return None

        return hook

    for group in groups:
        keep_BC = None if masker is None else masker.columns(group, items)
        if keep_BC is not None or tap is not None:
            hooks[group.output] = make(group, keep_BC)
    return hooks, seen


def _mask(masker: Masker, group: UnitGroup, keep_BC: torch.Tensor, input_BSC: torch.Tensor) -> None:
    """Replace removed columns by their imputed inputs, or by zeros, in place."""
    imputed = masker.impute(group, input_BSC)
    if imputed is None:
        input_BSC.mul_(keep_BC.to(input_BSC.dtype)[:, None, :])
        return
    columns_P, imputed_BSP = imputed
    input_BSC[..., columns_P] = torch.where(
        keep_BC[:, None, columns_P], input_BSC[..., columns_P], imputed_BSP
    )


def show_inputs(
    tap: Tap, seen: list[tuple[UnitGroup, torch.Tensor]], batches: MicroBatches, windows: int
) -> None:
    """Show a finished layer's inputs to the tap, in smaller parts where it runs out of memory."""
    for group, input_BSC in seen:
        batches.run(windows, lambda part, g=group, x=input_BSC: tap.inputs(g, x[part]))  # type: ignore[misc]
