"""Read tensors of the source and cut them, a few megabytes at a time.

In: a :class:`Checkpoint` and, for each tensor, the indices that stay in each dimension. Out: the
rows of the output, piece by piece and in order. A thread reads the next piece while the caller
writes the last one. Holds a few pieces of :data:`PIECE_BYTES`, whatever the size of a tensor. The
buffers are reused, so the system does not have to clear new memory.

Shape suffixes: R rows of dimension 0 of the source, P rows of the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy
import torch

from frugal_bonsai.checkpoint.header import TensorEntry
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.dtypes import torch_dtype

PIECE_BYTES = 2**21  # measured: larger pieces leave the processor's cache before they are written
_BUFFERS = 2  # one is filled while the other is cut and written
# Bytes per element -> integer dtype as which numpy sees the data: it has no bfloat16.
_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class TensorCut:
    """The part of one tensor that is written.

    Attributes:
        name: the tensor.
        indices: dimension -> source index of every output index, int64, ascending; -1 stands for
            zeros. Dimensions without an entry stay whole. Dimensions count in the canonical
            orientation (``[out, in]``); the stream itself works in the file's orientation.
    """

    name: str
    indices: Mapping[int, torch.Tensor]

    def stored(self, entry: TensorEntry) -> TensorCut:
        """Return the cut with the dimensions counted in the file's orientation."""
        if not entry.transposed:
            return self
        return TensorCut(self.name, {1 - axis: kept for axis, kept in self.indices.items()})


@dataclass(frozen=True, eq=False)
class _Piece:
    """Neighbouring rows of a tensor, and the output rows made from them.

    Attributes:
        cut: the cut of the tensor.
        start: first row in the source.
        stop: one past the last row.
        rows_P: source row of each output row, counted from ``start``; -1 stands for zeros. None
            takes all rows.
    """

    cut: TensorCut
    start: int
    stop: int
    rows_P: torch.Tensor | None


def stream_cuts(
    checkpoint: Checkpoint, cuts: Sequence[TensorCut]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read and cut tensors one after the other.

    Args:
        checkpoint: the source.
        cuts: the tensors and their cuts, in the order of the output.

    Yields:
        Name and next rows of a tensor, contiguous, on the CPU, in the source's dtype and the file's
        orientation. They are valid until the next iteration.

    Raises:
        CheckpointError: a failing read.
    """
    stored = [cut.stored(checkpoint.entry(cut.name)) for cut in cuts]
    pieces = [piece for cut in stored for piece in _pieces(checkpoint, cut)]
    size = max((_size_bytes(checkpoint, piece) for piece in pieces), default=0)
    buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(_BUFFERS)]
    scratch = _Scratch()
    with ThreadPoolExecutor(1, thread_name_prefix="rewrite") as pool:
        reads: list[Future[torch.Tensor]] = []
        for at, piece in enumerate(pieces):
            while len(reads) < min(_BUFFERS, len(pieces) - at):
                ahead = at + len(reads)
                buffer = buffers[ahead % _BUFFERS]
                reads.append(pool.submit(_read, checkpoint, pieces[ahead], buffer))
            yield piece.cut.name, scratch.cut(reads.pop(0).result(), piece)


def _pieces(checkpoint: Checkpoint, cut: TensorCut) -> Iterator[_Piece]:
    """Split a tensor into pieces of rows. A scalar is one piece."""
    entry = checkpoint.entry(cut.name)
    rows = entry.stored_shape[0] if entry.shape else 1
    step = max(1, PIECE_BYTES * rows // max(1, entry.size_bytes))
    stops = [*range(step, rows, step), rows]
    if 0 not in cut.indices:
        for stop in stops:
            yield _Piece(cut, max(0, stop - 1) // step * step, stop, None)
        return
    indices_P = cut.indices[0]
    # A zero row belongs to the piece of the kept row before it, so the output stays in order.
    place_P = torch.cummax(indices_P, 0).values.clamp_(min=0)
    ends = torch.searchsorted(place_P, torch.tensor(stops)).tolist()
    for begin, end in zip([0, *ends], ends, strict=False):
        # Between two stops are at most ``step`` kept rows; any further rows are zeros.
        for rows_P in torch.split(indices_P[begin:end], step):
            if begin == end and len(indices_P):
                continue  # no row stays
            kept = rows_P[rows_P >= 0]
            # Rows before the first and after the last kept row are not read.
            first, last = (int(kept[0]), int(kept[-1])) if len(kept) else (0, -1)
            yield _Piece(cut, first, last + 1, torch.where(rows_P < 0, -1, rows_P - first))


def _size_bytes(checkpoint: Checkpoint, piece: _Piece) -> int:
    """Return the bytes of the piece's rows in the source."""
    entry = checkpoint.entry(piece.cut.name)
    rows = entry.stored_shape[0] if entry.shape else 1
    return (piece.stop - piece.start) * entry.size_bytes // max(1, rows)


def _read(checkpoint: Checkpoint, piece: _Piece, buffer_uint8: torch.Tensor) -> torch.Tensor:
    """Read the piece's rows ``[R, ...]`` into the buffer."""
    name, entry = piece.cut.name, checkpoint.entry(piece.cut.name)
    if not entry.shape:
        return checkpoint.read_into(name, buffer_uint8)
    checkpoint.read_rows_into(name, piece.start, piece.stop, buffer_uint8)
    used = buffer_uint8[: _size_bytes(checkpoint, piece)].view(torch_dtype(entry.dtype))
    return used.view(piece.stop - piece.start, *entry.stored_shape[1:])


class _Scratch:
    """Reused memory for cut pieces: one buffer for each dimension that is cut."""

    def __init__(self) -> None:
        self._memory: dict[int, torch.Tensor] = {}

    def cut(self, source: torch.Tensor, piece: _Piece) -> torch.Tensor:
        """Return the piece without removed rows and columns, and with zeros."""
        if piece.rows_P is not None:
            source = self._take(source, 0, piece.rows_P)
        for axis, indices in piece.cut.indices.items():
            if axis:
                source = self._take(source, axis, indices)
        return source

    def _take(self, source: torch.Tensor, axis: int, indices: torch.Tensor) -> torch.Tensor:
        """Return the given indices of one dimension; -1 gives zeros."""
        shape = (*source.shape[:axis], len(indices), *source.shape[axis + 1 :])
        out = self._buffer(axis, math.prod(shape) * source.element_size())
        out = out.view(source.dtype).view(shape)
        if source.shape[axis]:
            # numpy's take is several times as fast as torch's index_select within rows. With
            # mode="clip", which turns -1 into 0, it makes no copy.
            number = _WHOLE_NUMBERS[source.element_size()]
            values, taken = source.view(number).numpy(), out.view(number).numpy()
            numpy.take(values, indices.numpy(), axis=axis, out=taken, mode="clip")
        zeros = (indices < 0).nonzero().flatten()
        return out.index_fill_(axis, zeros, 0) if len(zeros) else out

    def _buffer(self, axis: int, size_bytes: int) -> torch.Tensor:
        """Return memory of this size; it is enlarged if need be."""
        if axis not in self._memory or self._memory[axis].numel() < size_bytes:
            self._memory[axis] = torch.empty(size_bytes, dtype=torch.uint8)
        return self._memory[axis][:size_bytes]
