"""A student whose frozen projections are read from disk layer by layer, for models that do not fit.

In: a pruned checkpoint. Out: the gradients of a resident student, with one layer's weights in
memory. Each step reads every layer twice: in order for the forward pass, and in reverse for the
backward pass. All micro-batches of a step pass a layer while it is there. Only adapters can be
trained this way.

Holds the largest layer and the head as they are stored, and the inputs of all layers for all
windows of a step. An accelerator holds two layers, and pinned host buffers for them: the next layer
is read and copied while one is computed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from frugal_bonsai.accelerator import has_streams
from frugal_bonsai.adapt.head import STORED
from frugal_bonsai.adapt.stored_linear import StoredLinear
from frugal_bonsai.adapt.student import Student
from frugal_bonsai.dtypes import torch_dtype
from frugal_bonsai.memory.training_items import STREAMED
from frugal_bonsai.stream.layers import LayerStream
from frugal_bonsai.stream.source import CheckpointSource


class StreamedStudent(Student):
    """A :class:`Student` that loads the projections of one layer at a time."""

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
