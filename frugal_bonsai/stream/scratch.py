"""Memory that is taken again and again for results of a moment.

In: shapes and dtypes. Out: uninitialised tensors in memory that stays. A block of some megabytes
that is freed goes back to the system, and to get it anew costs more than what is written there:
the system clears it page by page. Holds the largest block of each dtype.
"""

from __future__ import annotations

import torch


class Scratch:
    """Reused memory on one device; grows to the largest block and stays."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[torch.dtype, torch.Tensor] = {}

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised ``[rows, columns]``, valid until the next call with this dtype."""
        buffer = self._buffers.get(dtype)
        if buffer is None or buffer.numel() < rows * columns:
            del buffer
            self._buffers.pop(dtype, None)  # not held beside what takes its place
            with torch.inference_mode(False):  # usable inside and outside of inference mode
                buffer = torch.empty(rows * columns, dtype=dtype, device=self._device)
            self._buffers[dtype] = buffer
        return buffer[: rows * columns].view(rows, columns)
