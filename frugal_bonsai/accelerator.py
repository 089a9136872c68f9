"""Accelerators as torch knows them: CUDA (and ROCm, which torch calls CUDA), XPU, MPS.

In: a device. Out: its streams and memory by way of ``torch.accelerator``, and what it lacks. The
rest of the package asks here and never for a kind of device by name. Holds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CPU, CUDA, XPU, MPS = "cpu", "cuda", "xpu", "mps"
# Kinds of accelerator whose device code has been written; others are refused by name.
ACCELERATORS = (CUDA, XPU, MPS)
# MPS computes in the host's memory, and has neither fp64 nor streams that PyTorch shows.
_UNIFIED, _NO_DOUBLES, _NO_STREAMS = (MPS,), (MPS,), (MPS,)


def is_accelerator(device: torch.device | str) -> bool:
    """True for every device, or kind of device, but the CPU."""
    return (device if isinstance(device, str) else device.type) != CPU


def shares_host_memory(device: torch.device | str) -> bool:
    """True where a device, or kind of device, keeps its tensors in the host's memory."""
    kind = device if isinstance(device, str) else device.type
    return kind == CPU or kind in _UNIFIED


def has_streams(device: torch.device) -> bool:
    """True where copies can run during computation: streams, events and pinned host memory."""
    return is_accelerator(device) and device.type not in _NO_STREAMS


def available() -> torch.device | None:
    """The accelerator of this machine, without a number; None where there is none."""
    import torch

    found: torch.device | None = torch.accelerator.current_accelerator(check_available=True)
    return found


def sum_dtype(device: torch.device) -> torch.dtype:
    """Dtype of long sums: fp64; fp32 where the device has no fp64."""
    import torch

    return torch.float32 if device.type in _NO_DOUBLES else torch.float64


# -- streams -----------------------------------------------------------------------------------
def current_stream(device: torch.device) -> torch.Stream:
    """The stream that operations on this device are queued on."""
    import torch

    stream: torch.Stream = torch.accelerator.current_stream(device)
    return stream


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done everything that it was given; a CPU always has."""
    import torch

    if is_accelerator(device):
        torch.accelerator.synchronize(device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on a device, without waiting for the device.

    A copy from pageable memory would wait for everything that the device still has to do. The
    tensor goes through pinned memory instead, which torch's allocator keeps until it is copied.
    """
    if not has_streams(device) or tensor.device.type != CPU:
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


# -- memory ------------------------------------------------------------------------------------
def free_and_total_bytes(device: torch.device) -> tuple[int, int]:
    """Free and total memory of an accelerator, in bytes; on MPS what Metal recommends."""
    import torch

    module = torch.get_device_module(device)
    if device.type == MPS:
        total = int(module.recommended_max_memory())
        return total - int(module.driver_allocated_memory()), total
    free, total = module.mem_get_info(device)
    return int(free), int(total)


def reserved_bytes(device: torch.device) -> int:
    """Memory that torch's allocator has reserved on an accelerator now."""
    import torch

    if device.type == MPS:
        return int(torch.mps.driver_allocated_memory())
    return int(torch.accelerator.memory_reserved(device))


def peak_reserved_bytes(device: torch.device) -> int:
    """The most that torch's allocator has had reserved; on MPS, which keeps no peak, now."""
    import torch

    if device.type == MPS:
        return reserved_bytes(device)
    return int(torch.accelerator.max_memory_reserved(device))


def cap_allocator(device: torch.device, share: float) -> None:
    """Let torch's allocator take no more than a share of an accelerator's memory."""
    import torch

    module = torch.get_device_module(device)
    if device.type == MPS:
        module.set_per_process_memory_fraction(share)
    else:
        module.set_per_process_memory_fraction(share, device)


def empty_host_cache(device: torch.device) -> None:
    """Give pinned memory that nobody uses back to the system.

    torch's allocator of pinned memory keeps every block for the next of its size, otherwise for
    good: phases that need other sizes would add up.
    """
    import torch

    if not has_streams(device):
        return
    if hasattr(torch.accelerator, "empty_host_cache"):  # from torch 2.12 on
        torch.accelerator.empty_host_cache()
    elif device.type == CUDA:
        torch._C._host_emptyCache()


# -- for people --------------------------------------------------------------------------------
def name_of(device: torch.device) -> str:
    """An accelerator's name."""
    import torch

    if device.type == MPS:
        return "Apple GPU (MPS)"
    return str(torch.get_device_module(device).get_device_name(device))


# -- arithmetic --------------------------------------------------------------------------------
@contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """Within it fp32 products may round their factors to TF32 (10 bits); only where CUDA computes.

    For iterations that correct themselves. Not for factors and solves, whose errors grow with the
    matrix's condition.
    """
    import torch

    if device.type != CUDA:
        yield
        return
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before
