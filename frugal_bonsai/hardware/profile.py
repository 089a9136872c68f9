"""What a machine can do: a :class:`HardwareProfile`, measured or nominal.

In: rates. Out: a checked, frozen profile, and the caps that its memory gives. Holds nothing and
touches no device: a profile of a machine with a GPU is read, and planned for, on one without.
Measuring is in measure.py, files in profile_file.py, what follows from the rates in time_model.py.
"""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from frugal_bonsai.accelerator import (
    ACCELERATORS,
    CPU,
    CUDA,
    is_accelerator,
    name_of,
    shares_host_memory,
)
from frugal_bonsai.errors import OptionError
from frugal_bonsai.memory.budget import Budget, Caps
from frugal_bonsai.sizes import GIB, MIB, format_bytes

if TYPE_CHECKING:
    import torch

FP32, TF32, BF16, INT8 = "fp32", "tf32", "bf16", "int8"
ARITHMETIC = (FP32, TF32, BF16, INT8)
# What sweeps compute in, where the user names nothing else.
DEFAULT_ARITHMETIC = {CPU: FP32, **dict.fromkeys(ACCELERATORS, BF16)}
# What a process holds before the model, where it cannot be measured because the machine is another
# one: Python, torch and transformers; with a GPU also its libraries and the context's host side.
NOMINAL_BASE_BYTES = {CPU: 600 * MIB, **dict.fromkeys(ACCELERATORS, 2 * GIB)}
# Left to the rest of the machine when the user names no cap.
_LEAVE_HOST_BYTES = GIB


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """Rates and sizes of one machine.

    Attributes:
        name: of the machine, for people.
        device: ``cpu``, ``cuda``, ``xpu`` or ``mps``: where layers are computed.
        source: measured when and how, or ``nominal`` with where each number comes from.
        host_bytes: of host memory.
        gpu_bytes: of device memory; None where the device computes in the host's memory.
        disk_cold_bytes_per_second: sequential reads of a file that is not in the page cache.
        disk_warm_bytes_per_second: the same of a file that is.
        disk_write_bytes_per_second: sequential writes, fsync included.
        copy_bytes_per_second: pinned host memory to the device; None likewise.
        memory_bytes_per_second: elementwise operations on memory that is used again: bytes read
            and written, a second.
        fresh_bytes_per_second: first writes to memory that the system has just given (page faults);
            None where the allocator keeps what it has, as a GPU's does.
        attention_flops_per_second: causal attention in torch's fused kernel, counted as 2 S H_q
            operations a token.
        solve_flops_per_second: Cholesky factors, inverses and solves in fp32.
        call_seconds: what one call of a layer costs beside its arithmetic.
        start_seconds: a command's start: imports and the model's skeleton.
        products: operations a second of matrix products in ``fp32``, ``tf32`` (fp32 with factors
            of 10 bits, CUDA's), ``bf16`` and ``int8`` (int8 x int8 -> int32); what the device
            cannot do is absent.
    """

    name: str
    device: str
    source: str
    host_bytes: int
    gpu_bytes: int | None = None
    disk_cold_bytes_per_second: float
    disk_warm_bytes_per_second: float
    disk_write_bytes_per_second: float
    copy_bytes_per_second: float | None = None
    memory_bytes_per_second: float
    fresh_bytes_per_second: float | None = None
    attention_flops_per_second: float
    solve_flops_per_second: float
    call_seconds: float
    start_seconds: float
    products: Mapping[str, float]

    def __post_init__(self) -> None:
        for name in ("name", "source"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise OptionError(f"{name} is {value!r}, expected a text")
        kinds = (CPU, *ACCELERATORS)
        if self.device not in kinds:
            raise OptionError(f"device is {self.device!r}, expected one of {', '.join(kinds)}")
        optional = ("gpu_bytes", "copy_bytes_per_second", "fresh_bytes_per_second")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("name", "device", "source", "products"):
                continue
            if value is None and field.name in optional:
                continue
            _require_positive(field.name, value, zero=field.name.endswith("_seconds"))
        for name in ("gpu_bytes", "copy_bytes_per_second"):
            own = not shares_host_memory(self.device)
            if (getattr(self, name) is None) is own:
                needs = "needs" if own else "has no"
                raise OptionError(f"a {self.device} profile {needs} {name}")
        self._check_products()

    def _check_products(self) -> None:
        if not isinstance(self.products, Mapping):
            raise OptionError(f"products is {self.products!r}, expected a table of rates")
        for name, rate in self.products.items():
            if name not in ARITHMETIC:
                raise OptionError(
                    f"products.{name} is unknown, expected one of {', '.join(ARITHMETIC)}"
                )
            _require_positive(f"products.{name}", rate)
        for name in (FP32, DEFAULT_ARITHMETIC[self.device]):
            if name not in self.products:
                raise OptionError(f"products.{name} is missing; a {self.device} computes in it")

    @property
    def gram_rate(self) -> float:
        """Operations a second of activations' products that are summed in fp32."""
        return self.products[BF16 if self.device == CUDA else FP32]

    @property
    def tf32_rate(self) -> float:
        """Operations a second of fp32 products that may round their factors."""
        return self.products[TF32 if TF32 in self.products else FP32]

    @property
    def arithmetic(self) -> str:
        """What sweeps compute in by default."""
        return DEFAULT_ARITHMETIC[self.device]


def _require_positive(name: str, value: object, *, zero: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and name.endswith("_bytes"):
        number = isinstance(value, int)
    if not number or not math.isfinite(value) or value < 0 or (value == 0 and not zero):  # type: ignore[arg-type,operator]
        kind = "whole number" if name.endswith("_bytes") else "number"
        raise OptionError(f"{name} is {value!r}, expected a positive {kind}")


def device_name(device: torch.device) -> str:
    """The device's name for people."""
    import torch

    if is_accelerator(device):
        return name_of(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads != 1)}"


def _processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123  # no regular file
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: what Python knows
    return f"{platform.processor() or platform.machine()} CPU"


def profile_budget(profile: HardwareProfile, caps: Caps) -> Budget:
    """Return the budget of the profile's machine: the user's caps, else its memory."""
    notes: list[str] = []
    host = caps.host_bytes
    if host is None:
        host = max(profile.host_bytes - _LEAVE_HOST_BYTES, profile.host_bytes // 2)
    elif host > profile.host_bytes:
        notes.append(_more_than("--max-cpu-mem", host, profile.host_bytes))
    gpu = profile.gpu_bytes
    if gpu is None:
        if caps.gpu_bytes is not None:
            notes.append("--max-gpu-mem has no effect: the profile's machine has no GPU memory")
        return Budget(device=profile.device, host_bytes=host, notes=tuple(notes))
    if caps.gpu_bytes is not None:
        if caps.gpu_bytes > gpu:
            notes.append(_more_than("--max-gpu-mem", caps.gpu_bytes, gpu))
        gpu = min(gpu, caps.gpu_bytes)
    return Budget(device=profile.device, host_bytes=host, gpu_bytes=gpu, notes=tuple(notes))


def _more_than(option: str, cap_bytes: int, own_bytes: int) -> str:
    return (
        f"{option} {format_bytes(cap_bytes)} is more than the profile's {format_bytes(own_bytes)}"
    )
