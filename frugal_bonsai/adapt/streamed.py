"""A student that does not fit: its frozen weights are read layer by layer, there and back.

In: a pruned checkpoint. Out: the gradients of a resident student, with one layer's weights in
memory. Each step reads every layer twice, from the first to the last, then in reverse, where its
activations are computed again from the input that was kept at its boundary; all micro-batches of
the step pass a layer while it is there. Only adapters can be trained in this way. Holds the largest
layer and the head as they are stored, and the inputs of all layers for all windows of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from frugal_bonsai.adapt.frozen import FrozenLinear
from frugal_bonsai.adapt.head import STORED
from frugal_bonsai.adapt.student import Student
from frugal_bonsai.stream.source import align


class StreamedStudent(Student):
    """See the module's text; made as a :class:`Student` is, then given :meth:`place_frozen`."""

    def place_frozen(self) -> None:
        """Read what stands beside the projections; leave these empty, and make their buffer."""
        self.head.load(STORED)
        for layer in range(self.spec.layers):
            self.place_layer(layer)
        largest = max(map(self._layer_bytes, range(self.spec.layers)))
        self._bytes = torch.empty(largest, dtype=torch.uint8)

    def _layer_bytes(self, layer: int) -> int:
        """Bytes of a layer's projections one behind the other, each aligned."""
        size = 0
        for path in self.projections:
            name = f"{self.spec.prefix(layer)}{path}.weight"
            size = align(size + self.checkpoint.tensors[name].size_bytes)
        return size

    def _module(self, layer: int, path: str) -> FrozenLinear:
        module = self.layers[layer].get_submodule(path)
        base = getattr(module, "base_layer", module)  # peft's adapter has put itself around it
        assert isinstance(base, FrozenLinear)
        return base

    def _visit(self, layers: Iterable[int]) -> Iterator[int]:
        for layer in layers:
            self._fill(layer)
            yield layer
            self._empty(layer)

    def _fill(self, layer: int) -> None:
        offset = 0
        for path in self.projections:
            name = f"{self.spec.prefix(layer)}{path}.weight"
            weight_OI = self.checkpoint.read_into(name, self._bytes[offset:])
            offset = align(offset + self.checkpoint.tensors[name].size_bytes)
            self._module(layer, path).load(weight_OI.to(self.device))

    def _empty(self, layer: int) -> None:
        for path in self.projections:
            self._module(layer, path).load(torch.empty(0, dtype=self.dtype, device=self.device))
