"""Measuring a machine: matrix products, attention, elementwise work, copies.

In: a device, how long to take. Out: rates, of which run/profile.py
makes a :class:`~frugal_bonsai.hardware.profile.HardwareProfile`. Holds the matrices of one shape
(at most about 0.5 GB).

Each rate is the best of several runs: what disturbs a run only makes it slower. With one CPU thread
its processor time is taken instead of the wall's, so that other work on the machine counts less.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from frugal_bonsai.accelerator import (
    CUDA,
    is_accelerator,
    shares_host_memory,
    synchronize,
    tensor_cores,
)
from frugal_bonsai.hardware.profile import BF16, DEFAULT_ARITHMETIC, FP32, INT8, TF32
from frugal_bonsai.sizes import MIB

if TYPE_CHECKING:
    import torch

# (hidden, FFN channels) of Llama models of 1B and 8B: gate or up, and down_proj turned round.
SHAPES = ((2048, 8192), (4096, 14336))
_QUICK_SHAPES = ((1024, 2048),)
_CPU_TOKENS, _GPU_TOKENS = 256, 4096


@dataclass(frozen=True, kw_only=True)
class Timer:
    """Times a function on a device.

    Attributes:
        device: where it computes.
        seconds: how long to repeat it.
        least: runs at least, after one that is not counted.
    """

    device: torch.device
    seconds: float
    least: int = 1

    def best(self, run: Callable[[], object]) -> float:
        """Seconds of the fastest run; one before it is not counted."""
        clock = self._clock()
        self._timed(run, clock)
        best, runs, deadline = float("inf"), 0, time.perf_counter() + self.seconds
        while runs < self.least or time.perf_counter() < deadline:
            best, runs = min(best, self._timed(run, clock)), runs + 1
        return max(best, 1e-9)

    def _clock(self) -> Callable[[], float]:
        import torch

        alone = not is_accelerator(self.device) and torch.get_num_threads() == 1
        return time.thread_time if alone else time.perf_counter

    def _timed(self, run: Callable[[], object], clock: Callable[[], float]) -> float:
        started = clock()
        run()
        synchronize(self.device)
        return clock() - started


def measure_products(timer: Timer, *, quick: bool = False) -> dict[str, float]:
    """Operations a second of matrix products, for each arithmetic that the device has.

    Args:
        timer: device and patience.
        quick: one small shape, and no more than the device's own arithmetic and int8.

    Returns:
        All shapes' operations over all shapes' seconds: long products weigh more, as in a model.
    """
    kinds: tuple[str, ...] = (FP32, BF16, INT8)
    if timer.device.type == CUDA:
        kinds = (FP32, TF32, BF16, INT8)
    elif quick and not is_accelerator(timer.device):
        kinds = (FP32, INT8)
    shapes = _QUICK_SHAPES if quick else SHAPES
    rates = {}
    for kind in kinds:
        rate = _product_rate(timer, kind, shapes)
        if rate is not None:
            rates[kind] = rate
    return rates


def _product_rate(timer: Timer, kind: str, shapes: tuple[tuple[int, int], ...]) -> float | None:
    """None where the device has no such product."""
    import torch

    tokens = _GPU_TOKENS if is_accelerator(timer.device) else _CPU_TOKENS
    operations, seconds = 0.0, 0.0
    for hidden, ffn in shapes:
        input_TH = _random(timer.device, kind, tokens, hidden)
        weight_IH = _random(timer.device, kind, ffn, hidden)

        def run(left: torch.Tensor = input_TH, right: torch.Tensor = weight_IH) -> torch.Tensor:
            if kind == INT8:
                return torch._int_mm(left, right.T)
            with tensor_cores(timer.device) if kind == TF32 else nullcontext():
                return torch.nn.functional.linear(left, right)

        try:
            seconds += timer.best(run)
        except RuntimeError:
            # torch has this product for some devices and builds only; it says so by raising.
            return None
        operations += 2 * tokens * hidden * ffn
    return operations / seconds


def _random(device: torch.device, kind: str, *shape: int) -> torch.Tensor:
    """Numbers as a model has them: a GPU's clock depends on how many bits change."""
    import torch

    generator = torch.Generator().manual_seed(0)
    if kind == INT8:
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator).to(device)
    dtype = torch.bfloat16 if kind == BF16 else torch.float32
    return torch.randn(shape, generator=generator).to(device, dtype)


def measure_attention(timer: Timer) -> float:
    """Operations a second of causal attention: 2 S H_q a token, windows of 512, heads of 64."""
    import torch

    windows, heads, window, width = 4, 16, 512, 64
    kind = DEFAULT_ARITHMETIC[timer.device.type]
    query = _random(timer.device, kind, windows, heads, window, width)
    attend = torch.nn.functional.scaled_dot_product_attention
    seconds = timer.best(lambda: attend(query, query, query, is_causal=True))
    return 2 * window * heads * width * windows * window / seconds


def measure_memory(timer: Timer) -> float:
    """Bytes a second of elementwise work: an FFN's activation and a norm, 4,096 tokens of 1,024.

    Into arrays that are there already: what new ones cost is measured by itself. Three arrays of 16
    MiB are, like those of a layer, too large for a cache. Counted as cost.py counts: 5 elements for
    the activation, 7 for the norm.
    """
    import torch

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
    """Bytes a second of first writes to new blocks of 64 MiB; None where blocks are kept."""
    import torch

    if is_accelerator(timer.device):
        return None
    size = 64 * MIB
    return size / timer.best(lambda: torch.empty(size, dtype=torch.uint8).fill_(1))


def measure_copy(timer: Timer) -> float | None:
    """Bytes a second from pinned host memory to the device; None where both are one memory."""
    import torch

    if shares_host_memory(timer.device):
        return None
    size = 256 * MIB
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device=timer.device)
    return size / timer.best(lambda: device.copy_(host, non_blocking=True))
