"""Sources of a sweep's layers.

A :class:`LayerSource` reads a whole layer into a caller's byte buffer, and knows the place of each
tensor in it. :class:`CheckpointSource` reads a checkpoint in its own precision, optionally through
a keep mask (the *masked parent*); ``store.LayerStore`` reads the working copy. The head is streamed
in the same way: each chunk of its rows is a layer with one tensor, ``weight``. :class:`HeadSource`
reads the rows from a checkpoint, ``store.build_head_store`` quantises them.

A source holds no weights; it reads with pread into the caller's buffer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.dtypes import DTYPE_BYTES, torch_dtype
from frugal_bonsai.model.biases import added_biases, output_bias, weight_of
from frugal_bonsai.model.cut import Refit, cut_shape, cut_tensor, kept_indices, slices_by_tensor
from frugal_bonsai.model.drop import dropped_expert_tensors
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import KeepMask

if TYPE_CHECKING:
    import torch

ALIGNMENT_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Record:
    """Place of one tensor in a layer's bytes.

    Attributes:
        name: name inside the layer (``mlp.down_proj.weight``).
        shape: its shape.
        dtype: safetensors dtype of the stored elements (``I8`` for quantised ones).
        start: offset of the elements in the layer's bytes.
        scales_start: offset of the fp32 row scales, None for a tensor in native precision.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    scales_start: int | None = None

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Size of the elements, without scales."""
        return self.elements * DTYPE_BYTES[self.dtype]

    def view(self, layer_bytes: torch.Tensor) -> torch.Tensor:
        """Return the elements as a view of the layer's bytes (uint8)."""
        piece = layer_bytes[self.start : self.start + self.size_bytes]
        return piece.view(torch_dtype(self.dtype)).view(self.shape)

    def scales(self, layer_bytes: torch.Tensor) -> torch.Tensor:
        """Return the fp32 row scales as a view of the layer's bytes."""
        assert self.scales_start is not None
        piece = layer_bytes[self.scales_start : self.scales_start + 4 * self.shape[0]]
        return piece.view(torch_dtype("F32"))


class LayerSource(Protocol):
    """Reads layers for a stream."""

    @property
    def layers(self) -> int:
        """Number of layers."""

    def layer_bytes(self, layer: int) -> int:
        """Return the number of bytes that :meth:`read` fills."""

    def records(self, layer: int) -> tuple[Record, ...]:
        """Return the place of each of a layer's tensors in the buffer."""

    def announce(self, layer: int) -> None:
        """Ask the system to read a layer into its page cache in the background."""

    def read(self, layer: int, buffer: torch.Tensor) -> None:
        """Read a layer into the first ``layer_bytes(layer)`` bytes of a uint8 CPU tensor."""


def align(offset: int) -> int:
    """Round up to the alignment of vector loads."""
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class CheckpointSource:
    """A checkpoint's layers in their own precision; with a mask, the masked parent.

    Args:
        checkpoint: the open checkpoint.
        spec: its description.
        mask: the remaining units. Columns of removed units in the output projections are zero,
            which equals removing the units. Output biases of layers without any unit are zero too,
            so that only the residual stream passes. Shapes stay dense, with one exception: dropped
            experts are left out of the layer and of the router, because zeros would not keep
            tokens from being routed to them.
        refit: refitted tensors, remaining rows or columns only; they are scattered into the dense
            shape in the source's dtype. Biases that the source lacks are added to the layer.
            Requires ``mask``.
        dtype: safetensors dtype to which all tensors are converted; None keeps the checkpoint's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        *,
        mask: KeepMask | None = None,
        refit: Refit | None = None,
        dtype: str | None = None,
    ) -> None:
        self._dtype = dtype
        self._checkpoint, self._spec, self._mask, self._refit = checkpoint, spec, mask, refit or {}
        self._cuts, self._added = slices_by_tensor(spec.table), added_biases(spec, self._refit)
        self._dropped = () if mask is None else mask.dropped_layers()
        self._records = [self._lay_out(layer) for layer in range(spec.layers)]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self._spec.layers

    def layer_bytes(self, layer: int) -> int:
        """Return the size of one layer in the source's precision, aligned."""
        last = self._records[layer][-1]
        return align(last.start + last.size_bytes)

    def records(self, layer: int) -> tuple[Record, ...]:
        """Return the place of each of a layer's tensors in the buffer."""
        return self._records[layer]

    def announce(self, layer: int) -> None:
        """Ask the system to read a layer's tensors in the background."""
        prefix = self._spec.prefix(layer)
        for record in self._records[layer]:
            if prefix + record.name not in self._added:
                self._checkpoint.announce(prefix + record.name)

    def read(self, layer: int, buffer: torch.Tensor) -> None:
        """Read a layer's tensors into a uint8 buffer, masked if there is a mask."""
        prefix = self._spec.prefix(layer)
        for record in self._records[layer]:
            piece = buffer[record.start : record.start + record.size_bytes]
            if prefix + record.name in self._added:
                piece.zero_()
            elif self._mask is not None and record.shape != self._shape(layer, record.name):
                whole = self._checkpoint.read(prefix + record.name)  # a router, which is small
                rows = cut_tensor(whole, self._cuts[prefix + record.name], self._mask)
                record.view(buffer).copy_(rows)
            elif record.dtype == self._checkpoint.tensors[prefix + record.name].dtype:
                self._checkpoint.read_into(prefix + record.name, piece)
            else:
                record.view(buffer).copy_(self._checkpoint.read(prefix + record.name))
        if self._mask is None:
            return
        by_name = {prefix + record.name: record for record in self._records[layer]}
        for group in self._spec.table.of_layer(layer):
            if group.output_weight not in by_name:
                continue  # a dropped expert
            weight_HC = by_name[group.output_weight].view(buffer)
            weight_HC[:, ~self._mask.columns(group)] = 0
            if layer in self._dropped and output_bias(group) in by_name:
                by_name[output_bias(group)].view(buffer).zero_()
        for name in by_name.keys() & self._refit.keys():
            weight, pieces = by_name[name].view(buffer), self._cuts.get(name, [])
            if not pieces:  # a bias of an output projection, which no unit owns
                weight.copy_(self._refit[name]().to(weight.dtype))
                continue
            axis = pieces[0][1].axis
            kept = kept_indices(weight.shape[axis], pieces, self._mask)
            weight.index_copy_(axis, kept, self._refit[name]().to(weight.dtype))

    def _lay_out(self, layer: int) -> tuple[Record, ...]:
        prefix, offset, records = self._spec.prefix(layer), 0, []
        shapes = dict(self._spec.layer_tensors[layer])
        for bias in (name.removeprefix(prefix) for name in self._added if name.startswith(prefix)):
            shapes[bias] = shapes[weight_of(bias)][:1]
        for name, shape in self._kept_shapes(layer, shapes).items():
            stored = name if name in self._spec.layer_tensors[layer] else weight_of(name)
            dtype = self._dtype or self._checkpoint.tensors[prefix + stored].dtype
            records.append(Record(name=name, shape=tuple(shape), dtype=dtype, start=offset))
            offset = align(offset + records[-1].size_bytes)
        return tuple(records)

    def _shape(self, layer: int, name: str) -> tuple[int, ...]:
        """Return a tensor's shape in the source; () for a bias that the source lacks."""
        return tuple(self._spec.layer_tensors[layer].get(name, ()))

    def _kept_shapes(
        self, layer: int, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a layer's tensors without those of dropped experts."""
        if self._mask is None or layer in self._dropped:
            return dict(shapes)
        prefix, rule = self._spec.prefix(layer), self._spec.family.experts
        gone = dropped_expert_tensors(self._spec, self._mask, layer)
        kept = {name: shape for name, shape in shapes.items() if prefix + name not in gone}
        routers = () if rule is None else rule.router_tensors
        for router in (name for name in routers if name in kept):
            kept[router] = cut_shape(kept[router], self._cuts[prefix + router], self._mask)
        return kept


HEAD_WEIGHT = "weight"


class HeadSource:
    """A checkpoint's head (output embedding ``[V, H]``) in its own precision, in chunks of rows.

    Args:
        checkpoint: the open checkpoint.
        spec: its description.
        rows: number of rows of a chunk; the last one may have fewer.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, rows: int) -> None:
        self._checkpoint, self._name = checkpoint, spec.head_tensor
        entry = checkpoint.tensors[self._name]
        self._spans = head_spans(spec, rows)
        self._records = [
            (
                Record(
                    name=HEAD_WEIGHT, shape=(last - first, spec.hidden), dtype=entry.dtype, start=0
                ),
            )
            for first, last in self._spans
        ]

    @property
    def layers(self) -> int:
        """Number of chunks."""
        return len(self._spans)

    def layer_bytes(self, layer: int) -> int:
        """Return the size of one chunk."""
        return self._records[layer][0].size_bytes

    def records(self, layer: int) -> tuple[Record, ...]:
        """Return the place of the chunk's only tensor."""
        return self._records[layer]

    def announce(self, layer: int) -> None:
        """Ask the system to read a chunk's rows in the background."""
        self._checkpoint.announce(self._name, *self._spans[layer])

    def read(self, layer: int, buffer: torch.Tensor) -> None:
        """Read a chunk's rows into a uint8 buffer."""
        first, last = self._spans[layer]
        self._checkpoint.read_rows_into(self._name, first, last, buffer)


def head_spans(spec: ModelSpec, rows: int) -> list[tuple[int, int]]:
    """Return the range of rows of each chunk of the head, (first, end excluded)."""
    vocabulary = spec.vocabulary
    return [(first, min(first + rows, vocabulary)) for first in range(0, vocabulary, rows)]
