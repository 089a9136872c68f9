"""Loss sweeps again and again: an unordered access of two streams shows as another bit.

The expected losses come from a process under ``CUDA_LAUNCH_BLOCKING=1``, where every kernel ends
before the next thing begins. A small model runs under torch's stream sanitizer as well.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from bench_streaming import HalfOff

from frugal_bonsai.model.units import UnitGroup
from frugal_bonsai.run.open import Model
from frugal_bonsai.stream.store import LayerStore
from gpu_checks.check import Check, own_frames
from gpu_checks.models import int8_store, large, make_engine, opened, random_tokens, small

BLOCKING, SANITIZER = "blocking", "sanitizer"
# Clock cycles that the device is kept busy for, about 15 ms: the host runs far ahead of it then.
_BUSY_CYCLES = 25_000_000


class Busy(HalfOff):
    """Delays the device, so that unordered operations happen too early."""

    def columns(self, group: UnitGroup, items: slice) -> torch.Tensor:
        """Bool ``[B, C]``, after work that changes nothing."""
        if hasattr(torch._C, "_cuda_sleep"):
            torch.cuda._sleep(_BUSY_CYCLES)
        return super().columns(group, items)


def race(check: Check, variant: str | None = None) -> None:
    """Sweep 36 times in three ways, each time with a fresh engine, stream and head."""
    if variant == BLOCKING:
        _expected(check)
        return
    if variant == SANITIZER:
        _sanitised(check)
        return
    check.child(BLOCKING, {"CUDA_LAUNCH_BLOCKING": "1"}, seconds=45, here=_expected)
    if (check.work / "race.pt").exists():
        with check.part("sweeps"):
            _repeat(check)
    sanitizer = {} if check.dry else {"TORCH_CUDA_SANITIZER": "1"}
    check.child(SANITIZER, sanitizer, seconds=30, here=_sanitised)


def _losses(
    check: Check, model: Model, store: LayerStore, masker: HalfOff, *, resident: int
) -> torch.Tensor:
    """Losses of one masked sweep; nothing in it has been used before."""
    windows, window = (4, 32) if check.dry else (8, 1024)
    engine = make_engine(check, model, resident_windows=resident)
    tokens_NS = random_tokens(model.spec, windows, window)
    with engine.stream(store) as stream:
        return engine.sweep.losses(stream, engine.head, tokens_NS, masker=masker)


def _expected(check: Check) -> None:
    """Write the losses that every sweep must find."""
    with opened(check, large(check)) as model, int8_store(check, model) as store:
        first = _losses(check, model, store, HalfOff(), resident=10**6)
        spilled = _losses(check, model, store, HalfOff(), resident=1)
    torch.save(first, check.work / "race.pt")
    check.figure(
        "the expected losses",
        mean=float(first.mean()),
        finite=bool(torch.isfinite(first).all()),
        spilled_windows_give_the_same=torch.equal(first, spilled),
    )


def _repeat(check: Check) -> None:
    expected = torch.load(check.work / "race.pt")
    ways = (
        ("resident windows", HalfOff(), 10**6, 20),
        ("resident windows, device behind the host", Busy(), 10**6, 8),
        ("spilled windows, device behind the host", Busy(), 1, 8),
    )
    with opened(check, large(check)) as model, int8_store(check, model) as store:
        for how, masker, resident, sweeps in ways:
            done, equal, difference = 0, 0, 0.0
            for _ in range(2 if check.dry else sweeps):
                if check.left_seconds() < 3:
                    break
                found = _losses(check, model, store, masker, resident=resident)
                done, equal = done + 1, equal + torch.equal(found, expected)
                difference = max(difference, float((found - expected).abs().max()))
            check.figure(
                "sweeps",
                sweeps_with=how,
                sweeps=done,
                equal_to_the_bit=equal,
                largest_difference=difference,
            )
            with check.part(how):
                if equal < done:
                    raise AssertionError(f"{done - equal} of {done} sweeps found other losses")


def _sanitised(check: Check) -> None:
    """Resident and spilled sweeps; the sanitizer raises at the first unordered access."""
    with opened(check, small(check)) as model, int8_store(check, model) as store:
        for how, resident in (("resident windows", 10**6), ("spilled windows", 1)):
            with check.part(f"sanitizer: {how}"), _watched():
                found = _losses(check, model, store, HalfOff(), resident=resident)
                check.figure(
                    "under the sanitizer",
                    sweeps_with=how,
                    ran=True,
                    finite=bool(torch.isfinite(found).all()),
                )


@contextmanager
def _watched() -> Iterator[None]:
    """Have the sanitizer see threads that begin meanwhile, and say what it found where.

    Raises:
        AssertionError: it found an access without an order.
    """
    if "TORCH_CUDA_SANITIZER" not in os.environ:
        yield
        return
    from torch.cuda import _sanitizer

    run = threading.Thread.run

    def run_watched(thread: threading.Thread) -> None:
        with _sanitizer.cuda_sanitizer.dispatch:  # a mode is a thread's own
            run(thread)

    try:
        with mock.patch.object(threading.Thread, "run", run_watched):
            yield
    except _sanitizer.CUDASanitizerErrors as errors:
        raise AssertionError("; ".join(map(_found, errors.errors[:3]))) from errors


def _found(error: Any) -> str:
    """Both accesses: what, by which operation, on which stream, from where."""
    both = [getattr(error, name, None) for name in ("previous_access", "current_access")]
    parts = []
    for access in filter(None, both):
        operation = str(access.operator).partition("(")[0]
        where = ", ".join(own_frames(access.stack_trace)[-4:])
        parts.append(
            f"{access.type} {access.aliases} by {operation} on stream {access.stream} ({where})"
        )
    return " before ".join(parts) or str(error)
