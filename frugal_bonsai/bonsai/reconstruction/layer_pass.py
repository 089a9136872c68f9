"""One layer of the dense and the pruned model while the pruned layer's projections are refitted.

In: parameters and hidden states of both models. Out, for a micro-batch: the inputs of the pruned
model's projections and its residual stream after the refits so far, and the outputs that the
projections should have.

Memory: one layer of each model and the hidden states, which belong to the caller.

Shape suffixes: B windows of a micro-batch, S tokens, H hidden, C columns of a projection.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.func import functional_call
from torch.nn.functional import linear

from frugal_bonsai.accelerator import fast_products, is_accelerator
from frugal_bonsai.bonsai.importance.scores import ImportanceBuilder
from frugal_bonsai.bonsai.reconstruction.input_rows import input_projections
from frugal_bonsai.model.units import FFN, KeepMask, UnitGroup
from frugal_bonsai.row_blocks import block_rows
from frugal_bonsai.stream.call import call_layer, capture_input, capture_outputs, replaced
from frugal_bonsai.stream.forward import Sweep
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.layers import Parameters

Batch = Callable[[slice], torch.Tensor]
# Tokens of a micro-batch on a CPU, at most: the arrays of more tokens leave its cache.
_CPU_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions:
    """Which projections a reconstruction refits, and what it may hold.

    Attributes:
        ridge: lambda as a share of a Gram matrix's mean diagonal.
        mask: the remaining units, where input projections are refitted; None leaves them.
        channel_updates: maximum number of updates of each FFN's channels.
        keep_inputs: hold the inputs of one layer's output projections for all windows.
        keep_updates: hold the targets and slopes of the channel updates.
        fast: round the factors of products over tokens (:func:`accelerator.fast_products`).
        saved_dtype: full name of a weight -> dtype in which its refit is saved.
    """

    ridge: float
    mask: KeepMask | None = None
    channel_updates: int = 0
    keep_inputs: bool = True
    keep_updates: bool = True
    fast: bool = False
    saved_dtype: Callable[[str], torch.dtype] = lambda _: torch.float32


@dataclass(frozen=True, kw_only=True)
class PairedSweep:
    """Values that all layers of a reconstruction share.

    Attributes:
        sweep: device, micro-batches and progress.
        options: of the reconstruction.
        hidden_dense: the dense model's hidden states.
        hidden_pruned: the pruned model's hidden states.
        fitted: number of windows that refits learn from; they come first.
        held_out: number of windows after them, which only pass through the pruned model.
        scores: computes the next round's importance from the same moments; None computes none.
        dense_inputs: buffer for the dense inputs of the last sublayer, where they are needed.
        dense_outputs: buffer for the dense outputs of the last output projection, where a norm
            follows it.
        targets: buffer for the last sublayer's targets; None computes them again when needed.
    """

    sweep: Sweep
    options: ReconstructionOptions
    hidden_dense: HiddenStates
    hidden_pruned: HiddenStates
    fitted: int
    held_out: int
    scores: ImportanceBuilder | None
    dense_inputs: HiddenStates | None
    dense_outputs: HiddenStates | None
    targets: HiddenStates | None


@dataclass
class LayerPass:
    """One layer of both models.

    Attributes:
        pair: values that all layers share.
        layer: index of the layer.
        dense: the dense layer's parameters.
        pruned: the pruned layer's parameters; refits overwrite them.
        kwargs: keyword arguments that the model calls this layer with.
        outputs: refitted output projection -> its output for a micro-batch.
        refits: refit weights by full name, as they are to be saved.
        residual: share of each target's energy that its refit does not explain.
        extra_passes: passes over all fitted windows beyond those of every layer, counted by the
            share of the model's parameters.
    """

    pair: PairedSweep
    layer: int
    dense: Parameters
    pruned: Parameters
    kwargs: dict[str, Any]
    outputs: dict[str, Batch] = field(default_factory=dict)
    refits: dict[str, torch.Tensor] = field(default_factory=dict)
    residual: list[float] = field(default_factory=list)
    extra_passes: float = 0.0

    def __post_init__(self) -> None:
        skeleton = self.pair.sweep.skeleton
        self.spec = skeleton.spec
        self.module, self.device = skeleton.layers[self.layer], skeleton.device

    def run(self, count: int, body: Callable[[slice], None], *, weight: int = 1) -> None:
        """Call ``body`` with micro-batches of windows (:meth:`MicroBatches.run`)."""
        pair, most = self.pair, None
        if not is_accelerator(self.device):
            most = max(1, _CPU_TOKENS // pair.hidden_pruned.window)
        with fast_products(self.device) if pair.options.fast else nullcontext():
            pair.sweep.batches.run(count, body, weight=weight, most=most)

    # -- weights --------------------------------------------------------------------------------
    def adopt(self, name: str, weight: torch.Tensor) -> None:
        """Compute with a refit weight from now on, as it is saved, and keep it to be saved.

        It overwrites the parameter. A second copy, on the host, exists only where the compute dtype
        would lose precision that the saved dtype has.
        """
        parameter, full = self.pruned[name], self.spec.prefix(self.layer) + name
        saved = self.pair.options.saved_dtype(full)
        rows = block_rows(weight.shape[1], weight.element_size())
        for mine, refit in zip(parameter.split(rows), weight.split(rows), strict=True):
            mine.copy_(refit.to(saved))
        exact = parameter.dtype in (weight.dtype, saved)
        self.refits[full] = parameter if exact else weight.to(device="cpu", dtype=saved)

    def borrow(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Copy a weight into the memory of the dense layer's, which nothing reads any more.

        A weight of another dtype than the dense layer's is returned itself.
        """
        dense = self.dense[name]
        if weight.dtype != dense.dtype:
            return weight
        return dense.view(-1)[: weight.numel()].view(weight.shape).copy_(weight)

    # -- the pruned model -----------------------------------------------------------------------
    def inputs(self, projection: str, items: slice) -> torch.Tensor:
        """Return the input ``[B, S, C]`` of a projection after the refits so far."""
        hidden_BSH = self.pair.hidden_pruned.read(items)
        with self.with_refits(items):
            return capture_input(self.module, self.pruned, hidden_BSH, self.kwargs, projection)

    def recompute_inputs(self, projection: str) -> Batch:
        """Return a function that computes a projection's inputs with the refits of this moment."""
        before = dict(self.outputs)

        def compute(items: slice) -> torch.Tensor:
            now, self.outputs = self.outputs, before
            try:
                return self.inputs(projection, items)
            finally:
                self.outputs = now

        return compute

    def register_output(self, projection: str, inputs: Batch) -> None:
        """Compute a refitted projection's output from these inputs from now on."""
        weight_HC = self.pruned[f"{projection}.weight"]
        bias_H = self.pruned.get(f"{projection}.bias")
        self.outputs[projection] = lambda items: linear(inputs(items), weight_HC, bias_H)

    def with_refits(self, items: slice) -> ExitStack:
        """Return a context in which refitted sublayers return their new outputs."""
        # All outputs first: recomputing one runs the module, which must be whole.
        outputs = {projection: output(items) for projection, output in self.outputs.items()}
        stack = ExitStack()
        for projection, output_BSH in outputs.items():
            mixers = {mixer.output: mixer for mixer in self.spec.family.mixers}
            tupled = projection in mixers and mixers[projection].returns_tuple
            stack.enter_context(replaced(self.module, projection, output_BSH, returns_tuple=tupled))
        return stack

    def advance(self) -> None:
        """Replace the pruned model's hidden states by the refit layer's outputs."""
        hidden = self.pair.hidden_pruned

        def body(items: slice) -> None:
            hidden_BSH = hidden.read(items)
            with self.with_refits(items):
                output_BSH = call_layer(self.module, self.pruned, hidden_BSH, self.kwargs)
            hidden.write(items, output_BSH)

        self.run(self.pair.fitted + self.pair.held_out, body)
        # Recomputed outputs refer to this pass, which holds them: a cycle of tensors.
        self.outputs.clear()

    # -- targets --------------------------------------------------------------------------------
    def first_target(
        self, group: UnitGroup, items: slice
    ) -> tuple[torch.Tensor, Callable[[], None]]:
        """Return the output that the first sublayer's projection should have, bias included.

        This computes the dense layer, once for both sublayers. The second result stores the dense
        layer's output, and the other dense activations that the last sublayer needs; it is called
        after everything that allocates memory.
        """
        pair = self.pair
        before_BSH = pair.hidden_dense.read(items)
        outputs = [group.output]
        last = self._last_output()
        if pair.dense_outputs is not None:
            outputs.append(last)
        captured = capture_outputs(
            self.module,
            self.dense,
            before_BSH,
            self.kwargs,
            outputs,
            input_of=self._kept_input(),
        )
        own_BSH, last_BSH = captured.outputs[group.output], captured.outputs.get(last)
        result_BSH, input_BSH = captured.result_BSH, captured.input_BSH
        del captured  # frees the activations that are not needed
        missing_BSH = before_BSH + self._added(group.output, own_BSH, self.dense)
        missing_BSH = missing_BSH - self._residual(items)
        target_BSH = self._output_for(group.output, missing_BSH, own_BSH)

        def store() -> None:
            if pair.dense_inputs is not None and input_BSH is not None:
                pair.dense_inputs.write(items, input_BSH)
            if pair.dense_outputs is not None and last_BSH is not None:
                pair.dense_outputs.write(items, last_BSH)
            pair.hidden_dense.write(items, result_BSH)

        return target_BSH, store

    def _last_output(self) -> str:
        """Return the module whose output is the last sublayer's: a projection, or all experts."""
        family = self.spec.family
        return family.ffn_output if family.experts is None else family.experts.module

    def last_target(self, group: UnitGroup, items: slice) -> torch.Tensor:
        """Return the output that the last sublayer's projection should have, bias included.

        :meth:`first_target` has computed the dense layer.
        """
        if self.pair.dense_outputs is not None:
            return self.pair.dense_outputs.read(items)
        missing_BSH = self.pair.hidden_dense.read(items) - self._residual(items)
        return self._output_for(group.output, missing_BSH, None)

    def _kept_input(self) -> str | None:
        """Return the module whose dense input the refit of the last sublayer's inputs needs."""
        last = self.spec.table.of_layer(self.layer)[-1]
        channels = last.kind == FFN and last.expert is None
        if self.pair.options.mask is None or not channels:
            return None
        return input_projections(self.spec, last)[0]

    def _residual(self, items: slice) -> torch.Tensor:
        """Return the pruned model's residual stream before the next sublayer."""
        hidden_BSH = self.pair.hidden_pruned.read(items)
        for projection, output in self.outputs.items():
            hidden_BSH = hidden_BSH + self._added(projection, output(items), self.pruned)
        return hidden_BSH

    def _added(
        self, projection: str, output_BSH: torch.Tensor, parameters: Parameters
    ) -> torch.Tensor:
        """Return the contribution of a projection's output to the residual stream.

        A norm that follows the projection and the family's residual multiplier are applied.
        """
        norm, scale = self.spec.family.norm_behind(projection), self.spec.residual_scale
        if norm is not None:
            own = {
                name.removeprefix(f"{norm}."): value
                for name, value in parameters.items()
                if name.startswith(f"{norm}.")
            }
            output_BSH = functional_call(self.module.get_submodule(norm), own, (output_BSH,))
        return output_BSH if scale == 1.0 else output_BSH * scale

    def _output_for(
        self, projection: str, missing_BSH: torch.Tensor, dense_BSH: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the projection's output that adds ``missing_BSH`` to the residual stream.

        A norm after the projection cannot produce any value. There the target is the dense
        projection's own output ``dense_BSH``, and drift is not corrected.
        """
        if self.spec.family.norm_behind(projection) is not None:
            assert dense_BSH is not None
            return dense_BSH
        scale = self.spec.residual_scale
        return missing_BSH if scale == 1.0 else missing_BSH / scale
