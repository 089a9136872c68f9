"""The student: a pruned model's frozen weights, what is trained beside them, and its gradients.

In: a pruned checkpoint. Out: gradients of a loss over token windows, or its sums alone. Hugging
Face's own layers compute; embedding rows are read from disk. A layer's input is kept at its
boundary and its activations are computed again on the way back (gradient checkpointing), so that
one layer's are held at a time; what comes behind them is head.py's. Nothing is drawn at random in
a forward pass: dropout is off.

Holds the weights of all layers as stored (int8 or the checkpoint's dtype), the head, adapters and
their gradients. Where layers are streamed (streamed.py) one layer's.

Shape suffixes: B windows of a micro-batch, S tokens, H hidden, V vocabulary, O output rows and I
input columns of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from frugal_bonsai.adapt.frozen import FrozenLinear, TrainedLinear
from frugal_bonsai.adapt.head import DENSE, INT8, StudentHead
from frugal_bonsai.adapt.objective import Objective, hidden_error
from frugal_bonsai.adapt.part import Part, Sums
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.int8 import quantise_rows
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.stream.skeleton import Skeleton


@dataclass
class _Walk:
    """A micro-batch on its way: the inputs of the layers so far, then the gradient."""

    part: Part
    inputs: list[torch.Tensor] = field(default_factory=list)
    gradient: torch.Tensor | None = None


class Student:
    """A pruned model that can be trained.

    Args:
        checkpoint: the pruned model; stays open.
        spec: its description.
        device: where it is computed.
        dtype: compute dtype.
        head_tokens: tokens whose logits are held at a time.
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
        self.projections = projection_names(spec, self.layers)
        self.head = StudentHead(
            checkpoint,
            spec,
            self.skeleton.norm,
            device=device,
            dtype=dtype,
            head_tokens=head_tokens,
        )
        self._kwargs: tuple[int, list[dict[str, Any]]] | None = None

    # -- weights -------------------------------------------------------------------------------
    def load_frozen(self, *, int8: bool) -> None:
        """Read all weights: projections as int8 or as stored, the rest in the compute dtype.

        The head is int8 where projections are, else in the compute dtype: it is multiplied for
        every block of tokens.
        """
        self.head.load(INT8 if int8 else DENSE)
        for layer in range(self.spec.layers):
            for path in self.place_layer(layer):
                weight_OI = self.checkpoint.read(f"{self.spec.prefix(layer)}{path}.weight")
                module = self.layers[layer].get_submodule(path)
                assert isinstance(module, FrozenLinear)
                if int8:
                    module.load(*quantise_rows(weight_OI.to(self.device)))
                else:
                    module.load(weight_OI.to(self.device))

    def place_layer(self, layer: int) -> list[str]:
        """Put modules without weights where a layer's projections are; read all else of it.

        Returns:
            Names of the projections.
        """
        module, prefix = self.layers[layer], self.spec.prefix(layer)
        tensors = self.spec.layer_tensors[layer]
        for path in self.projections:
            outputs, inputs = tensors[f"{path}.weight"]
            bias_O = None
            if f"{path}.bias" in tensors:
                bias_O = self._read(f"{prefix}{path}.bias")
            frozen = FrozenLinear(inputs, outputs, dtype=self.dtype, bias_O=bias_O)
            module.set_submodule(path, frozen.to(self.device))
        owned = {f"{path}.{kind}" for path in self.projections for kind in ("weight", "bias")}
        for name in tensors:
            if name not in owned:
                owner, _, attribute = name.rpartition(".")
                value = nn.Parameter(self._read(prefix + name), requires_grad=False)
                setattr(module.get_submodule(owner), attribute, value)
        return self.projections

    def load_trained(self) -> None:
        """Read all weights, projections in fp32: they are trained themselves."""
        self.head.load(DENSE)
        for layer in range(self.spec.layers):
            for path in self.place_layer(layer):
                frozen = self.layers[layer].get_submodule(path)
                weight_OI = self.checkpoint.read(f"{self.spec.prefix(layer)}{path}.weight")
                outputs, inputs = weight_OI.shape
                whole = TrainedLinear(inputs, outputs, bias=False, device="meta")
                whole.weight = nn.Parameter(weight_OI.to(self.device, torch.float32))
                whole.bias = frozen.bias  # type: ignore[assignment]
                self.layers[layer].set_submodule(path, whole)

    def _read(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(name).to(self.device, self.dtype)

    # -- computing -----------------------------------------------------------------------------
    def gradients(self, parts: Sequence[Part], objective: Objective, *, scale: float) -> Sums:
        """Add the gradients of ``scale`` times the loss, summed over tokens, to what is trained.

        Args:
            parts: micro-batches, which pass each layer one after the other.
            objective: the loss.
            scale: 1 / tokens of the whole batch.

        Returns:
            The sums.
        """
        walks, sums = self._forward(parts, objective, keep=True), Sums()
        for walk in walks:
            walk.gradient, found = self.head.gradient(
                walk.part, walk.inputs.pop(), objective, scale
            )
            sums.add(found)
        for layer in self._visit(reverse=True):
            for walk in walks:
                sums.hidden += self._layer_gradient(layer, walk, objective, scale)
        return sums

    def measure(self, parts: Sequence[Part], objective: Objective) -> Sums:
        """The sums without gradients, the upper bound of the divergence too."""
        sums = Sums()
        with torch.no_grad():
            for walk in self._forward(parts, objective, keep=False, sums=sums):
                sums.add(self.head.sums(walk.part, walk.inputs.pop(), objective))
        return sums

    def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Logits of all tokens, fp32 ``[B, S, V]``."""
        with torch.no_grad():
            [walk] = self._forward([Part(tokens_BS)], Objective(lm=1.0), keep=False)
            return self.head.logits(walk.inputs[-1])

    def _forward(
        self,
        parts: Sequence[Part],
        objective: Objective,
        *,
        keep: bool,
        sums: Sums | None = None,
    ) -> list[_Walk]:
        """All micro-batches to the last layer's output, which is the last of their inputs."""
        walks = [_Walk(part, [self.skeleton.embed(part.tokens_BS).clone()]) for part in parts]
        with torch.no_grad():
            for layer in self._visit():
                for walk in walks:
                    output_BSH = self._call(layer, walk.inputs[-1])
                    walk.inputs = [*walk.inputs, output_BSH] if keep else [output_BSH]
                    target_BSH = self._wanted(layer, walk.part, objective)
                    if sums is not None and target_BSH is not None:
                        sums.hidden += float(hidden_error(output_BSH, target_BSH)[0])
        return walks

    def _layer_gradient(self, layer: int, walk: _Walk, objective: Objective, scale: float) -> float:
        """Compute a layer again from its input and go back through it."""
        input_BSH = walk.inputs.pop().detach().requires_grad_(layer > 0)
        with torch.enable_grad():
            output_BSH = self._call(layer, input_BSH)
        gradient_BSH, error = walk.gradient, 0.0
        assert gradient_BSH is not None
        target_BSH = self._wanted(layer, walk.part, objective)
        if target_BSH is not None:
            total, slope_BSH = hidden_error(output_BSH.detach(), target_BSH)
            error = float(total)
            slope_BSH = slope_BSH.mul_(objective.hidden * scale)
            gradient_BSH = gradient_BSH + slope_BSH.to(gradient_BSH.dtype)
        torch.autograd.backward(output_BSH, gradient_BSH)
        walk.gradient = input_BSH.grad
        return error

    def _wanted(self, layer: int, part: Part, objective: Objective) -> torch.Tensor | None:
        if part.targets is None or not objective.hidden or layer not in part.targets.hidden:
            return None
        return part.targets.hidden[layer].to(self.device)

    def _visit(self, *, reverse: bool = False) -> Iterator[int]:
        """Layers in order or in reverse, each with its weights in place while it is current."""
        layers = range(self.spec.layers)
        yield from reversed(layers) if reverse else layers

    def close(self) -> None:
        """Let go of what is held beside tensors: nothing here."""

    def _call(self, layer: int, hidden_BSH: torch.Tensor) -> torch.Tensor:
        output = self.layers[layer](hidden_BSH, **self._arguments(hidden_BSH.shape[1])[layer])
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _arguments(self, window: int) -> list[dict[str, Any]]:
        """What the model calls its layers with, as tensors that gradients may pass."""
        if self._kwargs is None or self._kwargs[0] != window:
            copies: dict[int, torch.Tensor] = {}

            def copy(value: torch.Tensor) -> torch.Tensor:
                return copies.setdefault(id(value), value.clone())

            kwargs = self.skeleton.layer_kwargs(window)
            self._kwargs = (window, tree_map_only(torch.Tensor, copy, kwargs))
        return self._kwargs[1]


def projection_names(spec: ModelSpec, layers: Sequence[nn.Module] | nn.ModuleList) -> list[str]:
    """The block projections of a layer: the linear modules with a weight that units own."""
    owned = {piece.tensor for group in spec.table.groups for piece in group.slices}
    names: dict[str, None] = {}
    for layer, module in enumerate(layers):
        for name, shape in spec.layer_tensors[layer].items():
            path = name.removesuffix(".weight")
            linear_module = len(shape) == 2 and isinstance(module.get_submodule(path), nn.Linear)
            if linear_module and spec.prefix(layer) + name in owned:
                names[path] = None
    return list(names)
