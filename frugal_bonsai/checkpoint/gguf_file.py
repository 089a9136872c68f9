"""Read the tensors of a GGUF file as floating numbers, as if they were stored so.

In: the file and, for each tensor of the model, the :class:`GgufView` that describes it. Out: bytes
in the model's dtype. A GGUF file quantises every row separately, so any rows can be read and
dequantised alone. Each tensor of the model has a range of virtual offsets, in which its values lie
one after the other; :class:`GgufFile` takes the place of a :class:`ReadFile` and fills a range by
dequantising what lies behind it. Holds a few megabytes. Several threads may read at the same time.

Shape suffixes: R rows, C columns of a row.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal_bonsai.checkpoint.files import ReadFile, tensor_bytes
from frugal_bonsai.checkpoint.gguf_header import GgufTensor
from frugal_bonsai.checkpoint.header import TensorEntry
from frugal_bonsai.dtypes import DTYPE_BYTES, torch_dtype

if TYPE_CHECKING:
    import numpy
    import torch

# Values that are dequantised together: the package's temporaries stay in the processor's cache.
_CHUNK_VALUES = 2**18
# Rows in another order are read together if fewer rows than this lie between them.
_GAP_ROWS = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class GgufView:
    """One tensor of the model, and how its values come from the file.

    Attributes:
        entry: the tensor. Its offsets are virtual.
        source: the tensor of the file.
        first_row: row of the source at which the tensor begins: an expert's, in a stack.
        order_R: int64, row of the source for each row of the tensor; None keeps the order.
        minus: number that is subtracted from every value, in fp32.
        columns_first: the tensor is the transpose of the source.
    """

    entry: TensorEntry
    source: GgufTensor
    first_row: int = 0
    order_R: numpy.ndarray[Any, Any] | None = None
    minus: float = 0.0
    columns_first: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the tensor, as it is read."""
        return math.prod(self.entry.shape[1:]) * DTYPE_BYTES[self.entry.dtype]

    @property
    def source_row_bytes(self) -> int:
        """Bytes of one row in the file. A vector's values are its rows."""
        rows = self.source.shape[0] if len(self.source.shape) == 1 else self.source.rows
        return self.source.size_bytes // max(1, rows)

    def source_rows(self, start: int, stop: int) -> tuple[int, int]:
        """Return the rows of the source that rows of the tensor come from, as a range."""
        if self.columns_first:
            return 0, self.source.rows
        if self.order_R is None or start == stop:
            return self.first_row + start, self.first_row + stop
        rows_R = self.order_R[start:stop]
        return int(rows_R.min()), int(rows_R.max()) + 1


class GgufFile(ReadFile):
    """A GGUF file whose tensors are read at virtual offsets; see the module.

    Args:
        path: the file.
        views: its tensors, by ascending virtual offsets.
        drop_behind: pages leave the system's page cache after they have been read.

    Raises:
        CheckpointError: the file cannot be opened.
    """

    def __init__(self, path: Path, views: Sequence[GgufView], *, drop_behind: bool = False) -> None:
        super().__init__(path, drop_behind=drop_behind)
        self._views = views
        self._starts = [view.entry.start for view in views]

    def advise_sequential(self, start: int, size_bytes: int) -> None:
        """Hint that a long range is about to be read in order."""
        super().advise_sequential(*self._behind(start, size_bytes))

    def advise_soon(self, start: int, size_bytes: int) -> None:
        """Hint that a range is about to be read, so that the system reads it ahead."""
        super().advise_soon(*self._behind(start, size_bytes))

    def read_into(self, view: memoryview, start: int, what: str) -> None:
        """Fill ``view`` with the values of whole rows of one tensor.

        Args:
            view: writable bytes.
            start: virtual offset of a row.
            what: name of the content for the error text.

        Raises:
            CheckpointError: the file ends early or the disk fails.
        """
        import torch

        if not len(view):
            return
        tensor, first, last = self._rows(start, len(view))
        target = torch.frombuffer(view, dtype=torch_dtype(tensor.entry.dtype))
        target_RC = target.view(last - first, -1)
        if tensor.columns_first:
            self._read_columns(target_RC, tensor, first, last, what)
            return
        columns = target_RC.shape[1]
        step = max(1, _CHUNK_VALUES // max(1, columns))
        for begin in range(first, last, step):
            end = min(begin + step, last)
            part_RC = target_RC[begin - first : end - first]
            if tensor.order_R is None:
                rows_RC = self._dequantise(tensor, *tensor.source_rows(begin, end), what)
                part_RC.copy_(rows_RC.view(end - begin, columns))
            else:
                self._read_ordered(part_RC, tensor, tensor.order_R[begin:end], what)

    def _read_ordered(
        self, target_RC: torch.Tensor, tensor: GgufView, rows_R: Any, what: str
    ) -> None:
        """Read rows of the source in any order, neighbours in one read."""
        import numpy
        import torch

        places_R = numpy.argsort(rows_R, kind="stable")
        sorted_R = rows_R[places_R]
        cuts = numpy.flatnonzero(numpy.diff(sorted_R) > _GAP_ROWS) + 1
        for piece, places in zip(
            numpy.split(sorted_R, cuts), numpy.split(places_R, cuts), strict=True
        ):
            found_RC = self._dequantise(tensor, int(piece[0]), int(piece[-1]) + 1, what)
            found_RC = found_RC.view(int(piece[-1]) + 1 - int(piece[0]), -1)
            picked = torch.from_numpy(piece - piece[0])
            target_RC[torch.from_numpy(places)] = found_RC[picked].to(target_RC.dtype)

    def _read_columns(
        self, target_RC: torch.Tensor, tensor: GgufView, first: int, last: int, what: str
    ) -> None:
        """Read columns of the source as rows. The whole source is dequantised, in pieces."""
        rows, columns = tensor.source.shape
        step = max(1, _CHUNK_VALUES // columns)
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            found_RC = self._dequantise(tensor, begin, end, what)
            target_RC[:, begin:end] = found_RC[:, first:last].T

    def _dequantise(self, tensor: GgufView, start: int, stop: int, what: str) -> torch.Tensor:
        """Read rows of the source and dequantise them: fp32 ``[R, C]``, or ``[R]`` of a vector."""
        import gguf
        import numpy
        import torch

        row_bytes, source = tensor.source_row_bytes, tensor.source
        raw = numpy.empty((stop - start, row_bytes), numpy.uint8)
        super().read_into(
            tensor_bytes(torch.from_numpy(raw).view(-1)), source.start + start * row_bytes, what
        )
        values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[source.kind])
        if tensor.minus:
            values = values - numpy.float32(tensor.minus)
        return torch.from_numpy(values)

    def _rows(self, start: int, size_bytes: int) -> tuple[GgufView, int, int]:
        """Return the tensor at a virtual offset, and the rows that a range of it covers."""
        tensor = self._views[bisect_right(self._starts, start) - 1]
        first, rest = divmod(start - tensor.entry.start, tensor.row_bytes)
        rows, more = divmod(size_bytes, tensor.row_bytes)
        if rest or more or start + size_bytes > tensor.entry.end:
            raise ValueError(f"{self.path}: no whole rows of one tensor at {start}")
        return tensor, first, first + rows

    def _behind(self, start: int, size_bytes: int) -> tuple[int, int]:
        """Return the start and size of the range in the file from which a range is computed."""
        if not size_bytes:
            return 0, 0
        tensor, first, last = self._rows(start, size_bytes)
        begin, end = tensor.source_rows(first, last)
        row_bytes = tensor.source_row_bytes
        return tensor.source.start + begin * row_bytes, (end - begin) * row_bytes
