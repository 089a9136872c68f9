"""What this machine can do: measured rates, and the time that a plan will take.

In: a device and shapes. Out: a :class:`HardwareProfile`, and :class:`TimeEstimate`. Measures for
well under a second; holds two small matrices and a read buffer.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from frugal_bonsai.checkpoint.files import ReadFile, tensor_bytes
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.sizes import MIB

if TYPE_CHECKING:
    import torch

# Attention, norms and copies beside the matrix products: a layer runs at this share of their rate.
_LAYER_EFFICIENCY = 0.6
_NOMINAL_DISK_BYTES_PER_SECOND = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """Rates of one machine.

    Attributes:
        name: of the device, for people.
        flops: of a matrix product at the model's shapes, per second.
        disk_bytes_per_second: of sequential reads.
        source: how the rates were got.
    """

    name: str
    flops: float
    disk_bytes_per_second: float
    source: str


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """Seconds of a prune, and which resource binds the sweeps."""

    sweeps_seconds: float
    stores_seconds: float
    binds: str

    @property
    def total_seconds(self) -> float:
        """Everything."""
        return self.sweeps_seconds + self.stores_seconds


def device_name(device: torch.device) -> str:
    """The device's name for people."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def measure_profile(
    spec: ModelSpec, device: torch.device, dtype: torch.dtype, file: Path
) -> HardwareProfile:
    """Measure matrix products at the FFN's shape, and a read of up to 64 MiB of ``file``."""
    return HardwareProfile(
        name=device_name(device),
        flops=_measure_flops(spec, device, dtype),
        disk_bytes_per_second=_measure_disk(file),
        source="measured now for less than a second; the file may have been in the page cache",
    )


def _measure_flops(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> float:
    import torch

    tokens, width = 512, min(spec.intermediate, 4096)
    input_TH = torch.ones(tokens, spec.hidden, device=device, dtype=dtype)
    weight_IH = torch.ones(width, spec.hidden, device=device, dtype=dtype)
    best = float("inf")
    deadline = time.perf_counter() + 0.25
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        for _ in range(4):
            torch.nn.functional.linear(input_TH, weight_IH)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 4 * 2 * tokens * spec.hidden * width / best


def _measure_disk(path: Path) -> float:
    import torch

    size = min(path.stat().st_size, 64 * MIB)
    buffer = torch.empty(size, dtype=torch.uint8)
    file = ReadFile(path)
    try:
        started = time.perf_counter()
        file.read_into(tensor_bytes(buffer), 0, "disk rate")
        seconds = time.perf_counter() - started
    finally:
        file.close()
    # A cached read says nothing about the disk: do not promise more than a usual one.
    return min(size / max(seconds, 1e-9), 2 * _NOMINAL_DISK_BYTES_PER_SECOND)


def flops_per_token(spec: ModelSpec, window: int) -> float:
    """Arithmetic of one token through all layers and the head."""
    attention = 2 * 2 * spec.heads * spec.head_dim * window / 2 * spec.layers
    return 2 * spec.block_parameters + attention + 2 * spec.vocabulary * spec.hidden


def estimate_time(
    profile: HardwareProfile,
    spec: ModelSpec,
    *,
    window: int,
    forward_tokens: int,
    gram_tokens: int,
    sweeps: int,
    stores: int,
    store_bytes: int,
) -> TimeEstimate:
    """Time of all sweeps and store builds.

    Args:
        profile: rates.
        spec: shapes.
        window: S.
        forward_tokens: tokens through the whole model.
        gram_tokens: tokens whose Gram matrices are collected in every layer.
        sweeps: passes over the layers on disk.
        stores: how often a store is built.
        store_bytes: bytes of one store.
    """
    gram = 2 * sum(group.columns**2 for group in spec.table.groups)
    arithmetic = forward_tokens * flops_per_token(spec, window) / _LAYER_EFFICIENCY
    arithmetic += gram_tokens * gram
    compute = arithmetic / profile.flops
    disk = sweeps * store_bytes / profile.disk_bytes_per_second
    # A build reads the source (two bytes an element or more), quantises and writes.
    stores_seconds = stores * store_bytes * 4 / profile.disk_bytes_per_second
    return TimeEstimate(
        sweeps_seconds=max(compute, disk),
        stores_seconds=stores_seconds,
        binds="compute" if compute >= disk else "disk",
    )
