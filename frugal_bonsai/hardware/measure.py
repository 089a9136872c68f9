"""Rates of a device: matrix products, attention, elementwise work, copies.

In: a device, and how long to measure. Out: rates, of which run/profile.py makes a
:class:`HardwareProfile`. The disk is in measure_disk.py. Holds the matrices of one shape, at most
about 0.5 GB.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from frugal_bonsai.accelerator import (
    CUDA,
    fast_products,
    is_accelerator,
    name_of,
    shares_host_memory,
    synchronize,
)
from frugal_bonsai.hardware.profile import ARITHMETIC, BF16, DEFAULT_ARITHMETIC, FP32, INT8, TF32
from frugal_bonsai.sizes import MIB

# (hidden, FFN channels) of Llama models of 1B and 8B: gate, up, and down_proj transposed.
SHAPES = ((2048, 8192), (4096, 14336))
_QUICK_SHAPES = ((1024, 2048),)
_CPU_TOKENS, _GPU_TOKENS = 256, 4096


@dataclass(frozen=True, kw_only=True)
class Timer:
    """Times functions on a device.

    The fastest of several runs counts, because a disturbance only makes a run slower. With one CPU
    thread the processor time of the thread counts, so that other programs disturb it less.

    Attributes:
        device: Device that computes.
        seconds: How long each function is repeated.
        least: Number of runs at least, after one that is not counted.
    """

    device: torch.device
    seconds: float
    least: int = 1

    def best(self, run: Callable[[], object]) -> float:
        """Return the seconds of the fastest run; a first one is not counted."""
        alone = not is_accelerator(self.device) and torch.get_num_threads() == 1
        clock = time.thread_time if alone else time.perf_counter
        times: list[float] = []
        deadline = time.perf_counter() + self.seconds
        while len(times) <= self.least or time.perf_counter() < deadline:
            started = clock()
            run()
            synchronize(self.device)
            times.append(clock() - started)
        return max(min(times[1:]), 1e-9)


def device_name(device: torch.device) -> str:
    """Return a device's name for people."""
    if is_accelerator(device):
        return name_of(device)
    processor = f"{platform.processor() or platform.machine()} CPU"
    cpuinfo = Path("/proc/cpuinfo")  # Linux alone
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    threads = torch.get_num_threads()
    return f"{processor}, {threads} thread{'s' * (threads != 1)}"


def measure_products(timer: Timer, *, quick: bool = False) -> dict[str, float]:
    """Return the operations a second of matrix products in each arithmetic of the device.

    Args:
        timer: The device's timer.
        quick: One small shape.

    Returns:
        All shapes' operations over all shapes' seconds: long products weigh more, as in a model.
    """
    cuda = timer.device.type == CUDA  # TF32 is CUDA's
    kinds = [kind for kind in ARITHMETIC if kind != TF32 or cuda]
    shapes = _QUICK_SHAPES if quick else SHAPES
    rates = {kind: _product_rate(timer, kind, shapes) for kind in kinds}
    return {kind: rate for kind, rate in rates.items() if rate is not None}


def _product_rate(timer: Timer, kind: str, shapes: tuple[tuple[int, int], ...]) -> float | None:
    """Return operations a second; None where the device has no such product."""
    tokens = _GPU_TOKENS if is_accelerator(timer.device) else _CPU_TOKENS
    operations, seconds = 0.0, 0.0
    for hidden, ffn in shapes:
        input_TH = _random(timer.device, kind, tokens, hidden)
        weight_IH = _random(timer.device, kind, ffn, hidden)

        def run(left: torch.Tensor = input_TH, right: torch.Tensor = weight_IH) -> torch.Tensor:
            if kind == INT8:
                return torch._int_mm(left, right.T)
            with fast_products(timer.device) if kind != FP32 else nullcontext():
                return torch.nn.functional.linear(left, right)

        try:
            seconds += timer.best(run)
        except RuntimeError:
            # torch raises where a device or a build lacks this product.
            return None
        operations += 2 * tokens * hidden * ffn
    return operations / seconds


def _random(device: torch.device, kind: str, *shape: int) -> torch.Tensor:
    """Return random numbers: a GPU's clock depends on how many bits change."""
    generator = torch.Generator().manual_seed(0)
    if kind == INT8:
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator).to(device)
    half = kind == BF16 and is_accelerator(device)  # a CPU rounds factors that are fp32
    dtype = torch.bfloat16 if half else torch.float32
    return torch.randn(shape, generator=generator).to(device, dtype)


def measure_attention(timer: Timer) -> float:
    """Return the operations a second of causal attention: windows of 512 tokens, heads of 64.

    A token counts 2 S C operations: S / 2 keys on average, two products, C query columns.
    """
    windows, heads, window, width = 4, 16, 512, 64
    kind = DEFAULT_ARITHMETIC[timer.device.type]
    query = _random(timer.device, kind, windows, heads, window, width)
    attend = torch.nn.functional.scaled_dot_product_attention
    seconds = timer.best(lambda: attend(query, query, query, is_causal=True))
    return 2 * window * heads * width * windows * window / seconds


def measure_memory(timer: Timer) -> float:
    """Return the bytes a second of elementwise work: an FFN's activation and a norm.

    The results go into arrays that exist already; new ones are measured by themselves. Like a
    layer's, the arrays (16 MiB) are too large for a cache. The activation takes 5 elements a
    channel, the norm 7.
    """
    large = is_accelerator(timer.device)
    element, tokens, width = (2, 16384, 4096) if large else (4, 4096, 1024)
    gate = _random(timer.device, DEFAULT_ARITHMETIC[timer.device.type], tokens, width)
    first, second = torch.empty_like(gate), torch.empty_like(gate)

    def run() -> None:
        torch.ops.aten.silu.out(gate, out=first)
        torch.mul(first, gate, out=second)
        torch.square(gate, out=first)
        scale = torch.rsqrt(first.mean(-1, keepdim=True) + 1e-5)
        torch.mul(gate, scale, out=first)
        torch.mul(first, gate[0], out=second)

    return 12 * element * tokens * width / timer.best(run)


def measure_fresh(timer: Timer) -> float | None:
    """Return the bytes a second of first writes to new blocks of 64 MiB; None on a GPU."""
    if is_accelerator(timer.device):
        return None
    size = 64 * MIB
    return size / timer.best(lambda: torch.empty(size, dtype=torch.uint8).fill_(1))


def measure_copy(timer: Timer) -> float | None:
    """Return the bytes a second from pinned host memory; None where both share memory."""
    if shares_host_memory(timer.device):
        return None
    size = 256 * MIB
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device=timer.device)
    return size / timer.best(lambda: device.copy_(host, non_blocking=True))
