"""Differences between devices: CUDA (also ROCm, which torch calls CUDA), XPU, MPS and the CPU.

In: a device. Out: its streams, its memory, and the operations that it lacks, through
``torch.accelerator``. The rest of the package calls these functions and compares no device names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CPU, CUDA, XPU, MPS = "cpu", "cuda", "xpu", "mps"
# Supported kinds of accelerators. Others are refused.
ACCELERATORS = (CUDA, XPU, MPS)
# MPS computes in the host's memory, has no fp64, and PyTorch has no streams for it.
_UNIFIED, _NO_DOUBLES, _NO_STREAMS = (MPS,), (MPS,), (MPS,)


def is_accelerator(device: torch.device | str) -> bool:
    """Return whether a device (or kind of device) is not the CPU."""
    return (device if isinstance(device, str) else device.type) != CPU


def shares_host_memory(device: torch.device | str) -> bool:
    """Return whether a device (or kind of device) keeps its tensors in the host's memory."""
    kind = device if isinstance(device, str) else device.type
    return kind == CPU or kind in _UNIFIED


def has_streams(device: torch.device) -> bool:
    """Return whether copies can run during computation (streams, events, pinned memory)."""
    return is_accelerator(device) and device.type not in _NO_STREAMS


def available() -> torch.device | None:
    """Return the accelerator of this machine, without an index; None if there is none."""
    import torch

    found: torch.device | None = torch.accelerator.current_accelerator(check_available=True)
    return found


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of long sums: fp64, or fp32 if the device has no fp64."""
    import torch

    return torch.float32 if device.type in _NO_DOUBLES else torch.float64


# -- streams -----------------------------------------------------------------------------------
def current_stream(device: torch.device) -> torch.Stream:
    """Return the stream on which operations of this device are queued."""
    import torch

    stream: torch.Stream = torch.accelerator.current_stream(device)
    return stream


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished all queued work; a no-op on a CPU."""
    import torch

    if is_accelerator(device):
        torch.accelerator.synchronize(device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to a device without waiting for the device.

    A copy from pageable memory would wait for all queued work. The tensor goes through pinned
    memory instead, which torch's allocator keeps until the copy is done.
    """
    if not has_streams(device) or tensor.device.type != CPU:
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


# -- memory ------------------------------------------------------------------------------------
def free_and_total_bytes(device: torch.device) -> tuple[int, int]:
    """Return free and total bytes of an accelerator's memory; on MPS, as Metal recommends."""
    import torch

    module = torch.get_device_module(device)
    if device.type == MPS:
        total = int(module.recommended_max_memory())
        return total - int(module.driver_allocated_memory()), total
    free, total = module.mem_get_info(device)
    return int(free), int(total)


def reserved_bytes(device: torch.device) -> int:
    """Return the bytes that torch's allocator has reserved on an accelerator."""
    import torch

    if device.type == MPS:
        return int(torch.mps.driver_allocated_memory())
    return int(torch.accelerator.memory_reserved(device))


def peak_reserved_bytes(device: torch.device) -> int:
    """Return the peak of :func:`reserved_bytes`; on MPS, which has no peak, the current value."""
    import torch

    if device.type == MPS:
        return reserved_bytes(device)
    return int(torch.accelerator.max_memory_reserved(device))


def cap_allocator(device: torch.device, share: float) -> None:
    """Limit torch's allocator to a share (0 to 1) of an accelerator's memory."""
    import torch

    module = torch.get_device_module(device)
    if device.type == MPS:
        module.set_per_process_memory_fraction(share)
    else:
        module.set_per_process_memory_fraction(share, device)


def empty_host_cache(device: torch.device) -> None:
    """Return unused pinned memory to the system.

    torch's allocator of pinned memory keeps every block for a later request of the same size.
    Without this call, phases with blocks of different sizes would add up.
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
    """Return an accelerator's name for people."""
    import torch

    if device.type == MPS:
        return "Apple GPU (MPS)"
    return str(torch.get_device_module(device).get_device_name(device))


# -- arithmetic --------------------------------------------------------------------------------
@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Let fp32 products round their factors inside the block: to TF32 on CUDA, to bf16 on a CPU.

    Sums stay fp32. A CPU rounds where it has instructions for bf16 (AMX, AVX-512 BF16, Arm's
    BF16); elsewhere nothing changes. Use it for passes over many tokens, whose rounding errors
    average out, not for factorisations and solves, whose errors grow with the condition number of
    the matrix.
    """
    import torch

    kinds = {CUDA: (torch.backends.cuda, "tf32"), CPU: (torch.backends.mkldnn, "bf16")}
    if device.type not in kinds:
        yield
        return
    backend, precision = kinds[device.type]
    products: Any = backend.matmul
    before, products.fp32_precision = products.fp32_precision, precision
    try:
        yield
    finally:
        products.fp32_precision = before
