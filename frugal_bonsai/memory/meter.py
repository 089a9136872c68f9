"""Meters of what a run really used: peak resident memory, peak reserved device memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def resident_bytes() -> int:
    """This process's resident memory now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """This process's largest resident memory so far."""
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
    """Memory that torch's allocator has reserved now on all GPUs; 0 before torch is there."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return sum(int(torch.cuda.memory_reserved(n)) for n in range(torch.cuda.device_count()))


def peak_gpu_bytes(device: torch.device, context_bytes: int) -> int | None:
    """Largest device memory so far: reserved by torch's allocator, and the context beside it.

    Args:
        device: None is returned for a CPU.
        context_bytes: of the CUDA context, which the allocator does not see.
    """
    if device.type != "cuda":
        return None
    import torch

    return int(torch.cuda.max_memory_reserved(device)) + context_bytes
