"""Memory that a run has used: peak resident memory, peak reserved device memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from frugal_bonsai.accelerator import (
    available,
    peak_reserved_bytes,
    reserved_bytes,
    shares_host_memory,
)

if TYPE_CHECKING:
    import torch


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


def reserved_gpu_bytes() -> int:
    """Return the bytes that torch's allocator has reserved on all GPUs; 0 without torch."""
    torch = sys.modules.get("torch")
    if torch is None or (kind := available()) is None or shares_host_memory(kind):
        return 0
    if not torch.get_device_module(kind).is_initialized():
        return 0
    count = torch.accelerator.device_count()
    return sum(reserved_bytes(torch.device(kind.type, n)) for n in range(count))


def peak_gpu_bytes(device: torch.device, context_bytes: int) -> int | None:
    """Return the peak device memory in bytes: reserved by torch's allocator, plus the context.

    Args:
        device: The device. The result is None if it computes in the host's memory.
        context_bytes: Bytes of the device's context, which the allocator does not count.
    """
    if shares_host_memory(device):
        return None
    return peak_reserved_bytes(device) + context_bytes
