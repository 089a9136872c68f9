"""Memory caps, and the device that they hold for.

In: ``--max-gpu-mem``, ``--max-cpu-mem``, ``--device``. Out: a :class:`Budget` in bytes. The cap on
a GPU is enforced in torch's allocator, less the device's context. Near the cap on host memory the
C library returns freed blocks to the system at once.
"""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from frugal_bonsai.accelerator import (
    ACCELERATORS,
    CPU,
    CUDA,
    MPS,
    XPU,
    available,
    cap_allocator,
    free_and_total_bytes,
    is_accelerator,
    reserved_bytes,
    shares_host_memory,
    synchronize,
)
from frugal_bonsai.errors import BudgetError, OptionError
from frugal_bonsai.ranks.launch import launched
from frugal_bonsai.sizes import GIB, MIB, format_bytes, parse_bytes

if TYPE_CHECKING:
    import torch

# Bytes of a GPU's context and kernels outside torch's allocator, where they cannot be measured.
NOMINAL_CONTEXT_BYTES = 600 * MIB
# A context is smaller: more bytes in use outside the allocator belong to another program.
_LARGEST_CONTEXT_BYTES = 2 * GIB
# Bytes left to other programs when the user names no cap; on a GPU also to libraries that load late
# and to the desktop.
_LEAVE_HOST_BYTES, _LEAVE_GPU_BYTES = GIB, 384 * MIB
_NAMES = {CUDA: "CUDA", XPU: "XPU", MPS: "MPS"}
# glibc keeps freed blocks below a threshold, which it raises up to 32 MiB by itself, and fragments
# them: measured, up to 90 MB more than is in use, varying from run to run. With a fixed threshold,
# larger blocks are mapped and unmapped one by one. That costs small models up to a third of their
# speed and large ones nothing, so it is done only near the cap.
_MALLOC_SLACK_BYTES, _MALLOC_SLACK_SHARE = 256 * MIB, 0.25
_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES = -3, 128 * 1024


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Caps of one run on one device, in bytes.

    Attributes:
        device: Kind of device: ``"cpu"``, ``"cuda"``, ``"xpu"`` or ``"mps"``.
        host_bytes: Cap on the resident memory of this process.
        gpu_bytes: Cap on device memory, context included. None without a GPU, and if the device
            computes in the host's memory.
        context_bytes: Bytes of the device's context: measured, else nominal.
        notes: Notes for the user about the caps.
    """

    device: str
    host_bytes: int
    gpu_bytes: int | None = None
    context_bytes: int = NOMINAL_CONTEXT_BYTES
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Caps:
    """Caps as the user gives them, in bytes. None leaves it to what is free.

    Attributes:
        gpu_bytes: Cap on device memory (``--max-gpu-mem``).
        host_bytes: Cap on resident memory (``--max-cpu-mem``).
    """

    gpu_bytes: int | None = None
    host_bytes: int | None = None


def parse_caps(max_gpu_mem: str | int | None, max_cpu_mem: str | int | None) -> Caps:
    """Read the two caps: bytes, or text such as ``"24GB"``.

    Raises:
        OptionError: A cap is not a size.
    """
    gpu, host = max_gpu_mem, max_cpu_mem
    return Caps(
        gpu_bytes=None if gpu is None else parse_bytes(gpu, option="--max-gpu-mem"),
        host_bytes=None if host is None else parse_bytes(host, option="--max-cpu-mem"),
    )


def require_device_name(device: str | None) -> None:
    """Check the name of a device, without asking the machine for it.

    Raises:
        OptionError: ``device`` is not the name of a device.
    """
    if device is None or device == CPU:
        return
    kind, _, _ = device.partition(":")
    if kind not in ACCELERATORS or re.fullmatch(r"(:\d{1,3})?", device[len(kind) :], re.A) is None:
        raise OptionError(
            f"--device: {device!r} is not cpu or one of {', '.join(ACCELERATORS)}, with or without "
            f"a number (cuda:1)"
        )


def find_device(device: str | None = None) -> torch.device:
    """Return the device that computes, with its number, and make it torch's current one.

    Libraries that name no number then use the same accelerator.

    Args:
        device: Device that the user names, such as ``"cuda:1"``. None takes the accelerator if
            there is one, else the CPU.

    Raises:
        OptionError: ``device`` is not the name of a device.
        BudgetError: There is no such accelerator.
    """
    import torch

    require_device_name(device)
    here = available()
    if device is None:
        device = CPU if here is None or here.type not in ACCELERATORS else here.type
    if device == CPU:
        return torch.device(CPU)
    kind, _, number = device.partition(":")
    found = torch.accelerator.device_count() if here is not None and here.type == kind else 0
    index = int(number) if number else _own_index(found)
    if index >= found:
        raise BudgetError(
            f"--device: {device} was asked for, but torch finds {found or 'no'} {_NAMES[kind]} "
            f"device{'s' * (found > 1)} here"
        )
    torch.accelerator.set_device_index(index)
    return torch.device(kind, index)


def _own_index(found: int) -> int:
    """Return the device that is used if none is named; ranks of a launch take one each in turn."""
    import torch

    launch = launched()
    if launch is not None and found:
        return launch.local_rank % found
    return torch.accelerator.current_device_index() if found else 0


def _sharers() -> int:
    """Return how many ranks of this host a device has at most."""
    import torch

    launch = launched()
    return 1 if launch is None else -(-launch.local_ranks // torch.accelerator.device_count())


def make_budget(device: torch.device, caps: Caps) -> Budget:
    """Return the budget of this machine: the user's caps, else what is free.

    Ranks of a launch share what is free on their host.
    """
    import psutil

    free = int(psutil.virtual_memory().available)
    own = int(psutil.Process().memory_info().rss)
    notes: list[str] = []
    host = caps.host_bytes
    if host is None:
        launch = launched()
        ranks = 1 if launch is None else launch.local_ranks
        host = max(own + free - _LEAVE_HOST_BYTES, own + free // 2) // ranks
    elif host > own + free:
        notes.append(
            f"--max-cpu-mem {format_bytes(host)} is more than the {format_bytes(own + free)} "
            f"that are free now"
        )
    if not is_accelerator(device):
        if caps.gpu_bytes is not None:
            notes.append(
                "--max-gpu-mem has no effect: there is no GPU; --max-cpu-mem caps this run"
            )
        return Budget(device=CPU, host_bytes=host, notes=tuple(notes))
    if shares_host_memory(device):
        return _unified_budget(device, host, caps.gpu_bytes, notes)
    return _gpu_budget(device, host, caps.gpu_bytes, notes)


def _gpu_budget(
    device: torch.device, host_bytes: int, cap_bytes: int | None, notes: list[str]
) -> Budget:
    """Return the budget where the accelerator has memory of its own."""
    context = measure_context(device)
    if context > _LARGEST_CONTEXT_BYTES:
        notes.append(
            f"{format_bytes(context)} of the GPU are in use outside this program's tensors, so "
            f"another program is there; its own context is taken to be "
            f"{format_bytes(NOMINAL_CONTEXT_BYTES)}"
        )
        context = NOMINAL_CONTEXT_BYTES
    free_gpu, total_gpu = free_and_total_bytes(device)
    ours = (free_gpu + context + reserved_bytes(device)) // _sharers()
    gpu = max(ours - _LEAVE_GPU_BYTES, ours // 2) if cap_bytes is None else cap_bytes
    if gpu > total_gpu:
        notes.append(f"--max-gpu-mem is more than the GPU's {format_bytes(total_gpu)}")
        gpu = total_gpu
    if gpu > ours:
        notes.append(
            f"--max-gpu-mem {format_bytes(gpu)} is more than the {format_bytes(ours)} that are "
            f"free on this GPU now: memory may run out below the cap; close other programs or "
            f"lower it"
        )
    return Budget(
        device=device.type,
        host_bytes=host_bytes,
        gpu_bytes=gpu,
        context_bytes=context,
        notes=tuple(notes),
    )


def _unified_budget(
    device: torch.device, host_bytes: int, cap_bytes: int | None, notes: list[str]
) -> Budget:
    """Return the budget where the accelerator uses the host's memory: the smaller cap counts."""
    if cap_bytes is not None:
        notes.append(
            f"{device.type} computes in the host's memory: the smaller of --max-gpu-mem and "
            f"--max-cpu-mem caps both together"
        )
        host_bytes = min(host_bytes, cap_bytes)
    return Budget(device=device.type, host_bytes=host_bytes, notes=tuple(notes))


def measure_context(device: torch.device) -> int:
    """Return the device memory in use outside torch's allocator: context, kernels, libraries.

    Kernels and libraries load at their first use, so each kind that a run needs is used first:
    products, attention, a factor, a solve. The driver counts the whole device, so memory of other
    programs is included.
    """
    import torch

    with torch.no_grad():
        ones = torch.ones(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
        torch.nn.functional.scaled_dot_product_attention(ones, ones @ ones, ones)
        identity = torch.eye(64, device=device)
        factor = torch.linalg.cholesky_ex(identity).L
        torch.linalg.solve_triangular(factor, identity, upper=False)
        torch.cholesky_solve(identity, factor)
        torch.linalg.solve(identity, identity)
    synchronize(device)
    free, total = free_and_total_bytes(device)
    return max(0, total - free - reserved_bytes(device))


def enforce_gpu_cap(device: torch.device, budget: Budget) -> None:
    """Limit torch's allocator to the cap less the device's context.

    Raises:
        BudgetError: The context alone takes the whole cap.
    """
    cap_allocator(device, allocator_share(budget, free_and_total_bytes(device)[1]))


def allocator_share(budget: Budget, total_bytes: int) -> float:
    """Return the share of the device's memory that torch's allocator may take.

    Raises:
        BudgetError: The context alone takes the whole cap.
    """
    assert budget.gpu_bytes is not None
    left = budget.gpu_bytes - budget.context_bytes
    if left <= 0:
        raise BudgetError(
            f"--max-gpu-mem {format_bytes(budget.gpu_bytes)} is too small: the device's context "
            f"alone takes {format_bytes(budget.context_bytes)}; raise it, or take --device cpu"
        )
    return min(1.0, left / total_bytes)


def enforce_host_cap(cap_bytes: int, planned_bytes: int) -> None:
    """Make glibc return every large freed block at once if the planned peak comes near the cap."""
    slack = max(_MALLOC_SLACK_BYTES, int(_MALLOC_SLACK_SHARE * planned_bytes))
    if sys.platform != "linux" or planned_bytes + slack <= cap_bytes:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none, and no such threshold
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)


def return_freed_memory() -> None:
    """Have glibc return freed memory to the system; do nothing with other allocators."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
