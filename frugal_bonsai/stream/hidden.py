"""Residual stream of every window in flight.

In: the first layer's inputs. Out: slices on the compute device, which are written back after each
layer. Memory: windows * S * H elements. The planned number of windows is on the device, the rest in
host memory (spill.py), or on disk (disk_spill.py) where the host computes and has too little.

Shape suffixes: B windows of a micro-batch, S tokens of a window, H hidden.
"""

from __future__ import annotations

from pathlib import Path

import torch

from frugal_bonsai.accelerator import shares_host_memory
from frugal_bonsai.stream.disk_spill import DiskSpill
from frugal_bonsai.stream.micro_batch import memory_for
from frugal_bonsai.stream.spill import Spill


class HiddenStates:
    """Hidden states of ``windows`` windows.

    Args:
        windows: number of windows (or of (mask, window) pairs).
        window: S, number of tokens of each.
        hidden: H.
        device: where micro-batches are computed.
        dtype: compute dtype.
        resident: number of windows kept on the device; the rest spills to the host. A device that
            computes in the host's memory keeps all, or spills the rest to disk.
        disk: folder for what spills to disk; None spills nothing there.

    Raises:
        OutputError: the disk has too little room.
    """

    def __init__(
        self,
        windows: int,
        window: int,
        hidden: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        resident: int,
        disk: Path | None = None,
    ) -> None:
        self.windows, self.window, self.device = windows, window, device
        keeps_all = shares_host_memory(device) and disk is None
        self._resident = windows if keeps_all else min(windows, resident)
        with memory_for(f"hidden states of {windows} windows"):
            self._near = torch.empty(self._resident, window, hidden, dtype=dtype, device=device)
            far = windows - self._resident
            self._far: Spill | DiskSpill
            if shares_host_memory(device) and disk is not None and far:
                self._far = DiskSpill(far, window, hidden, device=device, dtype=dtype, folder=disk)
            else:
                self._far = Spill(far, window, hidden, device=device, dtype=dtype)

    def resident_like(self, columns: int) -> HiddenStates:
        """Allocate ``columns`` values for each token of the same windows, all on the device."""
        return HiddenStates(
            self.windows,
            self.window,
            columns,
            device=self.device,
            dtype=self._near.dtype,
            resident=self.windows,
        )

    def read(self, items: slice) -> torch.Tensor:
        """Return ``[B, S, H]`` on the device; a view where the windows are resident."""
        start, stop = items.start, min(items.stop, self.windows)
        if stop <= self._resident:
            return self._near[start:stop]
        far_BSH = self._far.read(slice(max(0, start - self._resident), stop - self._resident))
        if start >= self._resident:
            return far_BSH
        return torch.cat([self._near[start:], far_BSH])

    def write(self, items: slice, hidden_BSH: torch.Tensor) -> None:
        """Store these windows' new hidden states."""
        start, stop = items.start, min(items.stop, self.windows)
        near = max(0, min(stop, self._resident) - start)
        if near:
            self._near[start : start + near].copy_(hidden_BSH[:near])
        if near < stop - start:
            first = start + near - self._resident
            self._far.write(slice(first, stop - self._resident), hidden_BSH[near:])
