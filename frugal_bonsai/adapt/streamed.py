"""A student that does not fit: its frozen weights are read layer by layer, there and back.

In: a pruned checkpoint. Out: the gradients of a resident student, with one layer's weights in
memory. Each step reads every layer twice, from the first to the last, then in reverse, where its
activations are computed again from the input that was kept at its boundary; all micro-batches of
the step pass a layer while it is there. Only adapters can be trained in this way. Holds the largest
layer (on an accelerator two, and pinned buffers for them: the next one is read and copied
meanwhile) and the head as they are stored, and the inputs of all layers for all windows of a step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from frugal_bonsai.accelerator import has_streams
from frugal_bonsai.adapt.frozen import FrozenLinear
from frugal_bonsai.adapt.head import STORED
from frugal_bonsai.adapt.student import Student
from frugal_bonsai.dtypes import torch_dtype
from frugal_bonsai.stream.layers import LayerStream, Parameters
from frugal_bonsai.stream.source import CheckpointSource


class StreamedStudent(Student):
    """See the module's text; made as a :class:`Student` is, then given :meth:`place_frozen`."""

    def place_frozen(self) -> None:
        """Read what stands beside the projections; leave these empty, and make their buffers."""
        self.head.load(STORED)
        for layer in range(self.spec.layers):
            self.place_layer(layer)
        weight = f"{self.spec.prefix(0)}{self.projections[0]}.weight"
        self._stream = LayerStream(
            CheckpointSource(self.checkpoint, self.spec),
            device=self.device,
            dtype=torch_dtype(self.checkpoint.tensors[weight].dtype),  # as stored: used in place
            buffers=2 if has_streams(self.device) else 1,
        )

    def close(self) -> None:
        """Stop reading and let the buffers go."""
        self._stream.close()

    def _module(self, layer: int, path: str) -> FrozenLinear:
        module = self.layers[layer].get_submodule(path)
        base = getattr(module, "base_layer", module)  # peft's adapter has put itself around it
        assert isinstance(base, FrozenLinear)
        return base

    def _visit(self, *, reverse: bool = False) -> Iterator[int]:
        for layer, parameters in self._stream.visit(reverse=reverse):
            self._fill(layer, parameters)
            yield layer
            self._empty(layer)

    def _fill(self, layer: int, parameters: Parameters) -> None:
        for path in self.projections:
            self._module(layer, path).load(parameters[f"{path}.weight"])

    def _empty(self, layer: int) -> None:
        for path in self.projections:
            self._module(layer, path).load(torch.empty(0, dtype=self.dtype, device=self.device))
