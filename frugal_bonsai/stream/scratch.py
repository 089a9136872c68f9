"""Reused memory for short-lived results.

In: shapes and dtypes. Out: uninitialised tensors. A freed block of some megabytes returns to the
operating system. Allocating it again costs more than writing to it, because the system clears it
page by page. Memory: the largest block of each dtype.
"""

from __future__ import annotations

import torch


class Scratch:
    """Reused memory on one device; it grows to the largest block and never shrinks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[torch.dtype, torch.Tensor] = {}

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Return uninitialised ``[rows, columns]``, valid until the next call with this dtype."""
        buffer = self._buffers.get(dtype)
        if buffer is None or buffer.numel() < rows * columns:
            del buffer
            self._buffers.pop(dtype, None)  # not held beside its successor
            with torch.inference_mode(False):  # usable inside and outside of inference mode
                buffer = torch.empty(rows * columns, dtype=dtype, device=self._device)
            self._buffers[dtype] = buffer
        return buffer[: rows * columns].view(rows, columns)
