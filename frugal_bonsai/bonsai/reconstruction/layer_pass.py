"""One layer of the dense and the pruned model while its projections are refitted in turn.

In: both layers' parameters and hidden states. Out: for a micro-batch, the inputs of the pruned
model's projections and its residual stream, given the refits made so far. Holds what it is given.

Shape suffixes: B windows of a micro-batch, S tokens, H hidden, C columns of a projection.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.func import functional_call
from torch.nn.functional import linear

from frugal_bonsai.stream.call import capture_input, replaced
from frugal_bonsai.stream.forward import Sweep
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.layers import Parameters


@dataclass
class LayerPass:
    """One layer of both models while its projections are refitted in turn."""

    sweep: Sweep
    layer: int
    dense: Parameters
    pruned: Parameters
    hidden_dense: HiddenStates
    hidden_pruned: HiddenStates
    kwargs: dict[str, Any]
    # In which dtype a refit weight, by its full name, will be saved.
    saved_dtype: Callable[[str], torch.dtype]
    # The dense model's inputs of the last sublayer's projections, when those are refitted too.
    dense_inputs: HiddenStates | None = None
    # The dense model's output of the last output projection, where a norm lies behind that.
    dense_outputs: HiddenStates | None = None
    # Outputs of the sublayers that have been refitted, as functions of a micro-batch.
    outputs: dict[str, Callable[[slice], torch.Tensor]] = field(default_factory=dict)

    @property
    def module(self) -> torch.nn.Module:
        """Hugging Face's layer."""
        return self.sweep.skeleton.layers[self.layer]

    def adopt(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Compute with a refit weight from now on; the weight as it is to be saved.

        It overwrites the parameter that it replaces and is held a second time, on the host, only
        where the compute dtype would lose what the saved one keeps.
        """
        parameter = self.pruned[name]
        parameter.copy_(weight)
        saved = self.saved_dtype(self.sweep.skeleton.spec.prefix(self.layer) + name)
        if parameter.dtype in (weight.dtype, saved):
            return parameter
        return weight.to(device="cpu", dtype=saved)

    def borrow(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A copy of a weight in the memory of the dense layer's, once nothing reads that any more.

        What is wider than the dense layer's dtype stays where it is.
        """
        dense = self.dense[name]
        if weight.dtype != dense.dtype:
            return weight
        return dense.view(-1)[: weight.numel()].view(weight.shape).copy_(weight)

    def room(self, columns: int) -> HiddenStates:
        """Room on the device for the inputs of a projection of all windows, not written yet."""
        skeleton, hidden = self.sweep.skeleton, self.hidden_pruned
        return HiddenStates(
            hidden.windows,
            hidden.window,
            columns,
            device=skeleton.device,
            dtype=skeleton.dtype,
            resident=hidden.windows,
        )

    def known(self, items: slice) -> ExitStack:
        """A context in which the refitted sublayers return their new outputs."""
        # All outputs first: one that is computed again runs the module, which must be whole.
        outputs = {projection: output(items) for projection, output in self.outputs.items()}
        stack = ExitStack()
        for projection, output_BSH in outputs.items():
            attention = projection == self.sweep.skeleton.spec.family.attention_output
            stack.enter_context(
                replaced(self.module, projection, output_BSH, returns_tuple=attention)
            )
        return stack

    def residual(self, items: slice) -> torch.Tensor:
        """The pruned model's residual stream before the sublayer that comes next."""
        hidden_BSH = self.hidden_pruned.read(items)
        for projection, output in self.outputs.items():
            hidden_BSH = hidden_BSH + self.added(projection, output(items), self.pruned)
        return hidden_BSH

    def added(
        self, projection: str, output_BSH: torch.Tensor, parameters: Parameters
    ) -> torch.Tensor:
        """What a projection's output adds to the residual stream: behind norm and multiplier."""
        spec = self.sweep.skeleton.spec
        norm = spec.family.norm_behind(projection)
        if norm is not None:
            own = {
                name.removeprefix(f"{norm}."): value
                for name, value in parameters.items()
                if name.startswith(f"{norm}.")
            }
            output_BSH = functional_call(self.module.get_submodule(norm), own, (output_BSH,))
        scale = spec.residual_scale
        return output_BSH if scale == 1.0 else output_BSH * scale

    def to_give(
        self, projection: str, residual_BSH: torch.Tensor, dense_BSH: torch.Tensor | None
    ) -> torch.Tensor:
        """What a projection should give, its bias included.

        Args:
            projection: whose output it is.
            residual_BSH: what the sublayer should add to the pruned model's residual stream.
            dense_BSH: the dense projection's own output. A norm behind the projection cannot give
                whatever it is asked for: there this is the aim, and drift stays what it is.
        """
        spec = self.sweep.skeleton.spec
        if spec.family.norm_behind(projection) is not None:
            assert dense_BSH is not None
            return dense_BSH
        scale = spec.residual_scale
        return residual_BSH if scale == 1.0 else residual_BSH / scale

    def last_target(self, projection: str, items: slice) -> torch.Tensor:
        """What the last sublayer's projection should give; the dense layer has been computed."""
        if self.dense_outputs is not None:
            return self.dense_outputs.read(items)
        missing_BSH = self.hidden_dense.read(items) - self.residual(items)
        return self.to_give(projection, missing_BSH, None)

    def inputs(self, projection: str, items: slice) -> torch.Tensor:
        """The pruned model's input of a projection, given the refits before it."""
        hidden_BSH = self.hidden_pruned.read(items)
        with self.known(items):
            return capture_input(self.module, self.pruned, hidden_BSH, self.kwargs, projection)


class InputsAgain:
    """Computes a projection's inputs again, with the refits that stood before it."""

    def __init__(self, work: LayerPass, projection: str) -> None:
        self._work, self._projection = work, projection
        self._before = dict(work.outputs)

    def __call__(self, items: slice) -> torch.Tensor:
        """``[B, S, C]`` of a micro-batch."""
        now, self._work.outputs = self._work.outputs, dict(self._before)
        try:
            return self._work.inputs(self._projection, items)
        finally:
            self._work.outputs = now


class RefitOutput:
    """A refitted projection's output for a micro-batch."""

    def __init__(
        self,
        inputs: Callable[[slice], torch.Tensor],
        weight_HC: torch.Tensor,
        bias_H: torch.Tensor | None,
    ) -> None:
        self._inputs, self._weight_HC, self._bias_H = inputs, weight_HC, bias_H

    def __call__(self, items: slice) -> torch.Tensor:
        """``[B, S, H]`` of a micro-batch."""
        return linear(self._inputs(items), self._weight_HC, self._bias_H)
