"""``profile``: measure this machine, so that ``plan`` and ``prune`` can predict their time.

In: a device, a folder on the disk to measure. Out: a :class:`HardwareProfile`, as a TOML file or
plain values. :func:`quick_profile` measures for a second, for ``plan`` without a profile. Holds the
arrays of hardware/measure.py.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from frugal_bonsai.accelerator import free_and_total_bytes, is_accelerator, shares_host_memory
from frugal_bonsai.bonsai.importance.factor import DampedFactor
from frugal_bonsai.hardware.measure import (
    Timer,
    device_name,
    measure_attention,
    measure_copy,
    measure_fresh,
    measure_memory,
    measure_products,
)
from frugal_bonsai.hardware.measure_disk import DiskRates, measure_disk
from frugal_bonsai.hardware.profile import HardwareProfile, write_profile
from frugal_bonsai.memory.budget import find_device
from frugal_bonsai.memory.work import refit_rows
from frugal_bonsai.progress import Progress, Silent
from frugal_bonsai.run.early import check_profile
from frugal_bonsai.run.open import open_model
from frugal_bonsai.sizes import GIB, MIB
from frugal_bonsai.stream.call import call_layer
from frugal_bonsai.stream.engine import compute_dtype
from frugal_bonsai.stream.skeleton import Skeleton
from frugal_bonsai.version import package_version

# The start of a command until its first sweep, run in a new process.
_START = (
    "import scipy.optimize, scipy.stats\n"
    "from frugal_bonsai.run import prune\n"
    "from frugal_bonsai.run.engine import measured_base_bytes\n"
    "from frugal_bonsai.run.open import open_model\n"
    "with open_model('example') as model: measured_base_bytes(model.spec)"
)
# Rates of a usual NVMe disk (docs/hardware.md), which a second is too short to measure.
_NOMINAL_DISK = DiskRates(cold=1.5e9, warm=4e9, write=1e9, note="disk rates nominal")
_NOMINAL_START_SECONDS = 6.0
# Seconds of each measurement, and of a quick one.
_SECONDS, _QUICK_SECONDS = 1.0, 0.1
_CALLS = 10
# Others may take this share of the processors before a measurement says so.
_BUSY_SHARE = 0.15


def profile(
    *,
    out: str | Path | None = None,
    device: str | None = None,
    folder: str | Path = ".",
    quick: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure this machine.

    Args:
        out: TOML file to write. A profile is replaced, any other file is not.
        device: Device to measure. None takes a GPU if there is one.
        folder: Folder on the disk to measure. A file of about 1 GiB is written there and removed.
        quick: Measure small shapes and a small file: a few seconds, rougher.
        progress: Told of each measurement.

    Returns:
        The profile's fields as plain values, and ``out``.

    Raises:
        FrugalBonsaiError: There is no such device, the disk is full, or ``out`` is another file.
    """
    check_profile(None if out is None else Path(out), Path(folder), device)
    where, progress = find_device(device), progress or Silent()
    progress.note(f"measuring the disk at {Path(folder)}")
    disk = measure_disk(Path(folder), 64 * MIB if quick else GIB)
    progress.note("measuring a command's start")
    start = _measure_start(where)
    measured = _measured(where, disk, start=start, quick=quick, progress=progress)
    if out is not None:
        write_profile(measured, Path(out))
    values = dataclasses.asdict(measured)
    return {**values, "out": None if out is None else str(out)}


def quick_profile(device: torch.device) -> HardwareProfile:
    """Measure for about a second; the rates of the disk and a command's start are nominal."""
    start = _NOMINAL_START_SECONDS
    return _measured(device, _NOMINAL_DISK, start=start, quick=True, progress=Silent())


def _measured(
    device: torch.device, disk: DiskRates, *, start: float, quick: bool, progress: Progress
) -> HardwareProfile:
    timer, others = Timer(device=device, seconds=_QUICK_SECONDS if quick else _SECONDS), _Others()
    progress.note("measuring matrix products")
    products = measure_products(timer, quick=quick)
    progress.note("measuring attention, solves, memory and calls")
    rates: dict[str, Any] = {
        "copy_bytes_per_second": measure_copy(timer),
        "memory_bytes_per_second": measure_memory(timer),
        "fresh_bytes_per_second": measure_fresh(timer),
        "attention_flops_per_second": measure_attention(timer),
        "solve_flops_per_second": _measure_solves(timer, columns=512 if quick else 2048),
        "call_seconds": _measure_call(timer),
    }
    notes = [disk.note]
    if busy := others.note():
        progress.note(busy)
        notes.append(busy)
    gpu_bytes = None if shares_host_memory(device) else free_and_total_bytes(device)[1]
    return HardwareProfile(
        name=device_name(device),
        device=device.type,
        source=(
            f"measured {time.strftime('%Y-%m-%d')} by frugal-bonsai {package_version()}, "
            f"torch {torch.__version__}{', quick' if quick else ''}; {'; '.join(notes)}"
        ),
        host_bytes=int(psutil.virtual_memory().total),
        gpu_bytes=gpu_bytes,
        disk_cold_bytes_per_second=disk.cold,
        disk_warm_bytes_per_second=disk.warm,
        disk_write_bytes_per_second=disk.write,
        start_seconds=start,
        products=products,
        **rates,
    )


class _Others:
    """The share of this machine's processors that other programs take, from now on."""

    def __init__(self) -> None:
        self._busy, self._own, self._wall = self._read()

    def _read(self) -> tuple[float, float, float]:
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # Linux counts the time of guests twice.
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        return sum(times) - idle - guests, own.user + own.system, time.monotonic()

    def note(self) -> str | None:
        """Return a note if it is large; None if this machine was idle enough."""
        busy, own, wall = self._read()
        seconds = (wall - self._wall) * (psutil.cpu_count() or 1)
        share = (busy - self._busy - (own - self._own)) / max(seconds, 1e-9)
        if share < _BUSY_SHARE:
            return None
        return (
            f"BUSY: other programs took {min(share, 1):.0%} of the processors meanwhile, so these "
            f"rates may be too low; measure again when nothing else runs"
        )


def _measure_start(device: torch.device) -> float:
    """Return the seconds of a command's start: processor time of one thread, as in Timer."""
    before, started = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _START], capture_output=True, text=True)
    wall, after = time.perf_counter() - started, os.times()
    if done.returncode:
        raise RuntimeError(f"a command does not start here:\n{done.stderr}")
    spent = after.children_user + after.children_system
    spent -= before.children_user + before.children_system
    alone = not is_accelerator(device) and torch.get_num_threads() == 1
    return spent if alone and spent > 0 else wall  # Windows does not count children


def _measure_solves(timer: Timer, columns: int) -> float:
    """Return the operations per second of a Cholesky factor, its solves and its inverse."""
    identity_CC = torch.eye(columns, device=timer.device)
    # The rows that reconstruction refits together.
    rows = min(refit_rows(timer.device.type), columns // 2)
    right_RC = torch.ones(rows, columns, device=timer.device)

    def run() -> None:
        factor = DampedFactor(identity_CC.clone(), 1e-3, where="measuring")
        for _ in range(columns // 2 // rows):
            factor.solve(right_RC)
        factor.inverse_diagonal()

    operations = 2 * columns**3 / 3 + 2 * columns**2 * (columns // 2)
    return operations / timer.best(run)


def _measure_call(timer: Timer) -> float:
    """Return the seconds of a layer call of two tokens: overhead, hardly any arithmetic."""
    dtype = compute_dtype(timer.device)
    with open_model("example") as model, torch.inference_mode():
        skeleton = Skeleton(model.checkpoint, model.spec, device=timer.device, dtype=dtype)
        kwargs = skeleton.layer_kwargs(2)[0]
        parameters = {
            name: torch.ones(shape, device=timer.device, dtype=dtype)
            for name, shape in model.spec.layer_tensors[0].items()
        }
        hidden_BSH = torch.ones(1, 2, model.spec.hidden, device=timer.device, dtype=dtype)
        hooks = {group.output: _nothing for group in model.spec.table.of_layer(0)}

        def run() -> None:
            for _ in range(_CALLS):
                call_layer(skeleton.layers[0], parameters, hidden_BSH, kwargs, hooks)

        return timer.best(run) / _CALLS


def _nothing(_: torch.Tensor) -> None:
    """Change nothing, as a hook."""
