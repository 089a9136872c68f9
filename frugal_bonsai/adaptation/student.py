"""The student: a pruned model whose adapters or projections are trained.

In: a pruned checkpoint. Out: gradients of a loss over token windows, or the loss's sums. Hugging
Face's own layers compute; embedding rows are read from disk. Each layer's input is kept, and its
activations are computed again in the backward pass (gradient checkpointing), so that one layer's
activations are held at a time. head.py computes the loss. Dropout is off, so a forward pass draws
no random numbers.

Holds the weights of all layers, the head, the trained parameters and their gradients. For models
that do not fit, :class:`StreamedStudent` holds the largest layer and the head as they are stored,
and the inputs of all layers for all windows of a step.

Shape suffixes: B windows of a micro-batch, S tokens of a window, H hidden channels, V vocabulary, O
output rows and I input columns of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from frugal_bonsai.accelerator import has_streams
from frugal_bonsai.adaptation.head import DENSE, INT8, STORED, StudentHead
from frugal_bonsai.adaptation.objective import Sums, hidden_error
from frugal_bonsai.adaptation.settings import Objective
from frugal_bonsai.adaptation.stored_linear import StoredLinear
from frugal_bonsai.adaptation.training_data import MicroBatch
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.dtypes import torch_dtype
from frugal_bonsai.int8 import quantise_rows
from frugal_bonsai.memory.training_items import STREAMED
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.stream.layers import LayerStream
from frugal_bonsai.stream.skeleton import Skeleton
from frugal_bonsai.stream.source import CheckpointSource

# Form of projections that are trained themselves; frozen ones are native, int8 or streamed.
TRAINED = "trained"


@dataclass
class Activations:
    """What is kept of a micro-batch between layers.

    Attributes:
        batch: the micro-batch.
        inputs: inputs ``[B, S, H]`` of the layers that the backward pass has not reached, and the
            last layer's output until the loss is computed.
        gradient: gradient of the loss at the output of the layer that comes next in the backward
            pass.
    """

    batch: MicroBatch
    inputs: list[torch.Tensor] = field(default_factory=list)
    gradient: torch.Tensor | None = None


class Student:
    """A pruned model that can be trained; :meth:`load` comes first.

    Args:
        checkpoint: the pruned model; stays open.
        spec: its description.
        device: device to compute on.
        dtype: compute dtype.
        head_tokens: number of tokens whose logits are held at a time.

    Attributes:
        projections: paths of the block projections inside a layer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        *,
        device: torch.device,
        dtype: torch.dtype,
        head_tokens: int,
    ) -> None:
        self.checkpoint, self.spec, self.device, self.dtype = checkpoint, spec, device, dtype
        self.skeleton = Skeleton(checkpoint, spec, device=device, dtype=dtype)
        self.layers = nn.ModuleList(self.skeleton.layers)
        self.projections = projection_paths(spec, self.layers)
        self.head = StudentHead(checkpoint, self.skeleton, head_tokens=head_tokens)
        self._kwargs: tuple[int, list[dict[str, Any]]] | None = None

    # -- weights -------------------------------------------------------------------------------
    def load(self, form: str) -> None:
        """Read all weights.

        The head is int8 if the projections are, else in the compute dtype, because it is multiplied
        for every block of tokens.

        Args:
            form: of the projections: ``"native"`` (as stored), ``"int8"``, or :data:`TRAINED` (in
                fp32, with gradients). All other weights are in the compute dtype.
        """
        self.head.load(INT8 if form == INT8 else DENSE)
        self._place_layers()
        for name, module in self.projection_modules():
            weight_OI = self.checkpoint.read(name).to(self.device)
            if form == INT8:
                module.load(*quantise_rows(weight_OI))
            elif form == TRAINED:
                module.load(weight_OI.float(), trained=True)
            else:
                module.load(weight_OI)

    def projection_modules(self) -> Iterator[tuple[str, Any]]:
        """Yield each block projection's weight name in the checkpoint, and its module, in order."""
        for layer, module in enumerate(self.layers):
            for path in self.projections:
                yield f"{self.spec.prefix(layer)}{path}.weight", module.get_submodule(path)

    def _place_layers(self) -> None:
        """Replace the projections by :class:`StoredLinear` without weights; read all else."""
        for layer, module in enumerate(self.layers):
            prefix, tensors = self.spec.prefix(layer), self.spec.layer_tensors[layer]
            for path in self.projections:
                outputs, inputs = tensors[f"{path}.weight"]
                bias = f"{path}.bias"
                bias_O = self._read(prefix + bias) if bias in tensors else None
                stored = StoredLinear(inputs, outputs, dtype=self.dtype, bias_O=bias_O)
                module.set_submodule(path, stored.to(self.device))
            for name in tensors:
                owner, _, attribute = name.rpartition(".")
                if owner not in self.projections:
                    value = nn.Parameter(self._read(prefix + name), requires_grad=False)
                    setattr(module.get_submodule(owner), attribute, value)

    def _read(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(name).to(self.device, self.dtype)

    # -- computing -----------------------------------------------------------------------------
    def gradients(
        self, batches: Sequence[MicroBatch], objective: Objective, *, scale: float
    ) -> Sums:
        """Add the gradients of ``scale`` times the summed loss to the trained parameters.

        Args:
            batches: micro-batches, which pass each layer one after the other.
            objective: the loss.
            scale: 1 / number of tokens of the whole step.
        """
        kept, sums = self._forward(batches, objective, keep=True), Sums()
        for one in kept:
            output_BSH = one.inputs.pop()
            one.gradient, found = self.head.gradient(one.batch, output_BSH, objective, scale)
            sums.add(found)
        for layer in self._visit(reverse=True):
            for one in kept:
                sums.hidden += self._layer_gradient(layer, one, objective, scale)
        return sums

    def measure(self, batches: Sequence[MicroBatch], objective: Objective) -> Sums:
        """Return the sums without gradients, with the upper bound of the divergence."""
        sums = Sums()
        with torch.no_grad():
            for one in self._forward(batches, objective, keep=False, sums=sums):
                sums.add(self.head.sums(one.batch, one.inputs.pop(), objective))
        return sums

    def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Return the logits of all tokens, fp32 ``[B, S, V]``."""
        with torch.no_grad():
            [one] = self._forward([MicroBatch(tokens_BS)], Objective(lm=1.0), keep=False)
            return self.head.logits(one.inputs[-1])

    def _forward(
        self,
        batches: Sequence[MicroBatch],
        objective: Objective,
        *,
        keep: bool,
        sums: Sums | None = None,
    ) -> list[Activations]:
        """Run micro-batches through all layers; keep every layer's input, or the last output alone.

        The error of the hidden states that the objective compares is added to ``sums``.
        """
        kept = [Activations(one, [self.skeleton.embed(one.tokens_BS).clone()]) for one in batches]
        with torch.no_grad():
            for layer in self._visit():
                for one in kept:
                    output_BSH = self._call(layer, one.inputs[-1])
                    one.inputs = [*one.inputs, output_BSH] if keep else [output_BSH]
                    target_BSH = self._target(layer, one.batch, objective)
                    if sums is not None and target_BSH is not None:
                        sums.hidden += float(hidden_error(output_BSH, target_BSH)[0])
        return kept

    def _layer_gradient(
        self, layer: int, one: Activations, objective: Objective, scale: float
    ) -> float:
        """Compute a layer again and backpropagate through it; return its hidden states' error."""
        input_BSH = one.inputs.pop().detach().requires_grad_(layer > 0)
        with torch.enable_grad():
            output_BSH = self._call(layer, input_BSH)
        gradient_BSH, error = one.gradient, 0.0
        assert gradient_BSH is not None
        target_BSH = self._target(layer, one.batch, objective)
        if target_BSH is not None:
            total, slope_BSH = hidden_error(output_BSH.detach(), target_BSH)
            error = float(total)
            slope_BSH = slope_BSH.mul_(objective.hidden * scale)
            gradient_BSH = gradient_BSH + slope_BSH.to(gradient_BSH.dtype)
        torch.autograd.backward(output_BSH, gradient_BSH)
        one.gradient = input_BSH.grad
        return error

    def _target(self, layer: int, batch: MicroBatch, objective: Objective) -> torch.Tensor | None:
        """Return the teacher's hidden states behind a layer, if the loss compares them."""
        if batch.targets is None or not objective.hidden or layer not in batch.targets.hidden:
            return None
        return batch.targets.hidden[layer].to(self.device)

    def _visit(self, *, reverse: bool = False) -> Iterator[int]:
        """Yield layers in order or in reverse, each with its weights in place."""
        layers = range(self.spec.layers)
        yield from reversed(layers) if reverse else layers

    def close(self) -> None:
        """Close open files and buffers; a resident student has none."""

    def _call(self, layer: int, hidden_BSH: torch.Tensor) -> torch.Tensor:
        output = self.layers[layer](hidden_BSH, **self._arguments(hidden_BSH.shape[1])[layer])
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _arguments(self, window: int) -> list[dict[str, Any]]:
        """Return the keyword arguments of each layer, as tensors that autograd accepts."""
        if self._kwargs is None or self._kwargs[0] != window:
            copies: dict[int, torch.Tensor] = {}

            def copy(value: torch.Tensor) -> torch.Tensor:
                return copies.setdefault(id(value), value.clone())

            kwargs = self.skeleton.layer_kwargs(window)
            self._kwargs = (window, tree_map_only(torch.Tensor, copy, kwargs))
        return self._kwargs[1]


class StreamedStudent(Student):
    """A :class:`Student` that reads its frozen projections layer by layer; trains adapters only.

    Each step reads every layer twice: in order for the forward pass, and in reverse for the
    backward pass. All micro-batches of a step pass a layer while it is there. An accelerator holds
    two layers, and pinned host buffers for them: the next layer is read and copied while one is
    computed.
    """

    def load(self, form: str = STREAMED) -> None:
        """Read everything but the projections, and open the stream that reads these."""
        self.head.load(STORED)
        self._place_layers()
        weight = f"{self.spec.prefix(0)}{self.projections[0]}.weight"
        self._stream = LayerStream(
            CheckpointSource(self.checkpoint, self.spec),
            device=self.device,
            dtype=torch_dtype(self.checkpoint.tensors[weight].dtype),  # as stored: used in place
            buffers=2 if has_streams(self.device) else 1,
        )

    def close(self) -> None:
        """Stop reading and release the buffers."""
        self._stream.close()

    def _visit(self, *, reverse: bool = False) -> Iterator[int]:
        for layer, parameters in self._stream.visit(reverse=reverse):
            for path in self.projections:
                self._stored_linear(layer, path).load(parameters[f"{path}.weight"])
            yield layer
            for path in self.projections:
                empty = torch.empty(0, dtype=self.dtype, device=self.device)
                self._stored_linear(layer, path).load(empty)

    def _stored_linear(self, layer: int, path: str) -> StoredLinear:
        module = self.layers[layer].get_submodule(path)
        base = getattr(module, "base_layer", module)  # peft's adapter wraps the projection
        assert isinstance(base, StoredLinear)
        return base


def projection_paths(spec: ModelSpec, layers: Sequence[nn.Module] | nn.ModuleList) -> list[str]:
    """Return the paths inside a layer of the linear modules whose weights have prunable units."""
    owned = {piece.tensor for group in spec.table.groups for piece in group.slices}
    paths: dict[str, None] = {}
    for layer, module in enumerate(layers):
        for name, shape in spec.layer_tensors[layer].items():
            path = name.removesuffix(".weight")
            is_linear = len(shape) == 2 and isinstance(module.get_submodule(path), nn.Linear)
            if is_linear and spec.prefix(layer) + name in owned:
                paths[path] = None
    return list(paths)
