"""Tensors of the source on their way to the output, a few megabytes at a time.

In: a :class:`Checkpoint` and, for each tensor, which indices of its dimensions stay. Out: the
output's bytes as pieces of rows, in order. A thread reads the next piece while the last one is cut
and written. What is held does not depend on the size of a tensor: a few pieces of
:data:`PIECE_BYTES`, reused throughout, so that the system has no new memory to clear.

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

PIECE_BYTES = 2**21  # measured: larger ones do not stay in the cache from reading to writing
_BUFFERS = 2  # one is read while the other is cut and written
# Indices are taken from whole numbers of the same width: numpy has no bfloat16.
_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class TensorCut:
    """What of one tensor is written.

    Attributes:
        name: the tensor.
        indices: for each dimension that changes, the indices that stay, int64, ascending; -1 is a
            place that zeros fill. Dimensions are those of the tensor as it is read; what is read
            and written here is the file's own, which may be turned.
    """

    name: str
    indices: Mapping[int, torch.Tensor]

    def stored(self, entry: TensorEntry) -> TensorCut:
        """The same with the file's dimensions."""
        if not entry.transposed:
            return self
        return TensorCut(self.name, {1 - axis: kept for axis, kept in self.indices.items()})


@dataclass(frozen=True, eq=False)
class _Piece:
    """Some neighbouring rows of a tensor, and what they become.

    Attributes:
        cut: the tensor.
        start: first row in the source.
        stop: one past the last.
        rows_P: rows of the output, counted from ``start``; -1 is zeros. None takes all.
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
        cuts: what to take of each tensor, in the order in which they are wanted.

    Yields:
        Name and the next rows of a tensor, contiguous on the CPU, in the source's dtype; valid
        until the next one is asked for.

    Raises:
        CheckpointError: a failing read.
    """
    stored = [cut.stored(checkpoint.tensors[cut.name]) for cut in cuts]
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
    """A tensor as runs of rows; a single number is one piece."""
    entry = checkpoint.tensors[cut.name]
    rows = entry.stored_shape[0] if entry.shape else 1
    step = max(1, PIECE_BYTES * rows // max(1, entry.size_bytes))
    stops = [*range(step, rows, step), rows]
    if 0 not in cut.indices:
        for stop in stops:
            yield _Piece(cut, max(0, stop - 1) // step * step, stop, None)
        return
    indices_P = cut.indices[0]
    # A zero comes with the row before it, which keeps the order of the output.
    place_P = torch.cummax(indices_P, 0).values.clamp_(min=0)
    ends = torch.searchsorted(place_P, torch.tensor(stops)).tolist()
    for begin, end in zip([0, *ends], ends, strict=False):
        # At most a step of kept rows lies between two stops; what goes beyond are zeros.
        for rows_P in torch.split(indices_P[begin:end], step):
            if begin == end and len(indices_P):
                continue  # nothing stays of these rows
            kept = rows_P[rows_P >= 0]
            # What lies between pieces' kept rows is not read.
            first, last = (int(kept[0]), int(kept[-1])) if len(kept) else (0, -1)
            yield _Piece(cut, first, last + 1, torch.where(rows_P < 0, -1, rows_P - first))


def _size_bytes(checkpoint: Checkpoint, piece: _Piece) -> int:
    """Bytes of the piece's rows in the source."""
    entry = checkpoint.tensors[piece.cut.name]
    rows = entry.stored_shape[0] if entry.shape else 1
    return (piece.stop - piece.start) * entry.size_bytes // max(1, rows)


def _read(checkpoint: Checkpoint, piece: _Piece, buffer_uint8: torch.Tensor) -> torch.Tensor:
    """The piece's rows of the source, ``[R, ...]``, in the buffer."""
    name, entry = piece.cut.name, checkpoint.tensors[piece.cut.name]
    if not entry.shape:
        return checkpoint.read_into(name, buffer_uint8)
    checkpoint.read_rows_into(name, piece.start, piece.stop, buffer_uint8)
    used = buffer_uint8[: _size_bytes(checkpoint, piece)].view(torch_dtype(entry.dtype))
    return used.view(piece.stop - piece.start, *entry.stored_shape[1:])


class _Scratch:
    """Memory that cut pieces lie in, some for each dimension that is cut."""

    def __init__(self) -> None:
        self._memory: dict[int, torch.Tensor] = {}

    def cut(self, source: torch.Tensor, piece: _Piece) -> torch.Tensor:
        """The piece without what goes and with its zeros."""
        if piece.rows_P is not None:
            source = self._take(source, 0, piece.rows_P)
        for axis, indices in piece.cut.indices.items():
            if axis:
                source = self._take(source, axis, indices)
        return source

    def _take(self, source: torch.Tensor, axis: int, indices: torch.Tensor) -> torch.Tensor:
        shape = (*source.shape[:axis], len(indices), *source.shape[axis + 1 :])
        out = self._room(axis, math.prod(shape) * source.element_size())
        out = out.view(source.dtype).view(shape)
        if source.shape[axis]:
            # numpy's take is several times as fast as torch's index_select along a row; to clip,
            # which also turns -1 into 0, spares it a copy.
            number = _WHOLE_NUMBERS[source.element_size()]
            there, here = out.view(number).numpy(), source.view(number).numpy()
            numpy.take(here, indices.numpy(), axis=axis, out=there, mode="clip")
        zeros = (indices < 0).nonzero().flatten()
        return out.index_fill_(axis, zeros, 0) if len(zeros) else out

    def _room(self, axis: int, size_bytes: int) -> torch.Tensor:
        if axis not in self._memory or self._memory[axis].numel() < size_bytes:
            self._memory[axis] = torch.empty(size_bytes, dtype=torch.uint8)
        return self._memory[axis][:size_bytes]
