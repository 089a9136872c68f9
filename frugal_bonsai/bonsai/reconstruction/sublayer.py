"""An FFN's activations as a function of its channels' pre-activations, and their slopes.

In: a layer whose FFN is refitted, and some of its channels. Out: pre-activations, activations phi,
slopes phi'. phi is Hugging Face's own module and phi' a difference of two of its values, so no
activation function is written here.

Memory: one micro-batch of a block's values.

Shape suffixes: T tokens, H hidden, R channels of a block, K input projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch.func import functional_call

from frugal_bonsai.accelerator import sum_dtype
from frugal_bonsai.bonsai.reconstruction.input_rows import input_rows
from frugal_bonsai.bonsai.reconstruction.layer_pass import LayerPass
from frugal_bonsai.model.units import UnitGroup
from frugal_bonsai.stream.call import shadowed_forward

# Half the distance of the two values of a difference, as a share of the pre-activations' root mean
# square.
_DIFFERENCE = 1e-2


class Sublayer:
    """The pruned layer's FFN.

    Attributes:
        rows: rows of the input projections that the FFN's channels own.
        projection: name of the first input projection.
        names: names of the input projections' weights.

    Args:
        work: the layer of both models.
        group: the FFN's units.
    """

    def __init__(self, work: LayerPass, group: UnitGroup) -> None:
        self._parameters, self._module, self._output = work.pruned, work.module, group.output
        self.rows = tuple(input_rows(work.spec, group))
        self.projection = self.rows[0].projection
        self.names = list(dict.fromkeys(f"{rows.projection}.weight" for rows in self.rows))
        owner = work.spec.family.ffn_activation or group.output.rpartition(".")[0]
        self._activation_module = work.module.get_submodule(owner)
        projections = {*(rows.projection for rows in self.rows), group.output}
        # A learnt activation function has parameters of its own.
        self._own = {
            name.removeprefix(f"{owner}."): value.float()
            for name, value in work.pruned.items()
            if name.startswith(f"{owner}.") and name.rpartition(".")[0] not in projections
        }

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.rows[0].take(self._parameters[f"{self.projection}.weight"]))

    def weights(self, block: slice) -> list[torch.Tensor]:
        """Return a block of each input projection's weight, fp32 ``[R, H]``."""
        return [
            rows.take(self._parameters[f"{rows.projection}.weight"])[block].float()
            for rows in self.rows
        ]

    def pre_activations(
        self, weights: Sequence[torch.Tensor] | torch.Tensor, input_TH: torch.Tensor, block: slice
    ) -> list[torch.Tensor]:
        """Return a block's pre-activations, ``[T, R]`` for each input projection."""
        before = []
        for rows, weight_RH in zip(self.rows, weights, strict=True):
            before.append(input_TH @ weight_RH.T)
            bias = self._parameters.get(f"{rows.projection}.bias")
            if bias is not None:
                before[-1] += rows.take(bias)[block].float()
        return before

    def activation(self, before: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return phi: the channels' activations ``[T, R]``, given their pre-activations."""
        outputs: dict[str, torch.Tensor] = {}
        for rows, one_TR in zip(self.rows, before, strict=True):
            earlier_TR = outputs.get(rows.projection)
            whole = one_TR if earlier_TR is None else torch.cat([earlier_TR, one_TR], dim=-1)
            outputs[rows.projection] = whole
        with ExitStack() as stack:
            for name, output in outputs.items():
                module = self._module.get_submodule(name)
                stack.enter_context(shadowed_forward(module, lambda _, output=output: output))
            last = self._module.get_submodule(self._output)
            stack.enter_context(shadowed_forward(last, lambda input_TR: input_TR))
            activation_TR: torch.Tensor = functional_call(
                self._activation_module, self._own, (before[0],)
            )
        return activation_TR

    def slopes(self, before: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return phi' with respect to each input projection, ``[K, T, R]``.

        These are central differences.
        """
        slope_KTR = before[0].new_empty(len(before), *before[0].shape)
        for at, one_TR in enumerate(before):
            size = one_TR.square().mean().sqrt().to(sum_dtype(one_TR.device))
            reach = size.mul_(_DIFFERENCE).add_(1e-12)  # stays on the device: nothing waits for it
            moved = list(before)
            moved[at] = one_TR + reach
            slope_KTR[at] = self.activation(moved)
            moved[at] = one_TR - reach
            slope_KTR[at] -= self.activation(moved)
            slope_KTR[at] /= 2 * reach
        return slope_KTR
