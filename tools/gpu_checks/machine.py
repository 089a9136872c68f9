"""The device of the check: its facts, its clock, and the meters of its memory.

On a CPU, and where a meter is missing, the answers are None.
"""

from __future__ import annotations

import gc
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from frugal_bonsai.accelerator import synchronize
from frugal_bonsai.int8 import has_bitsandbytes
from gpu_checks.check import MACHINE, ROOT, Line

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes")
T = TypeVar("T")
_MIB = 2**20


@contextmanager
def computing_device(name: str, *, dry: bool) -> Iterator[torch.device]:
    """Yield the device to compute on; in a dry run a simulated GPU."""
    if dry and name != "cpu":
        has_bitsandbytes()  # imported before a CPU's torch claims to have a GPU
        sys.path.insert(0, str(ROOT / "tests"))
        with import_module("stand_in_device").installed() as machine:
            yield machine.device
        return
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        if device.index:  # it makes a context, which `caps` wants to see come
            torch.cuda.set_device(device)
    yield device


def machine_line(device: torch.device, *, dry: bool) -> Line:
    """The first line of a run: what it runs on and with."""
    import psutil

    card, total = "dry run" if dry else platform.processor() or platform.machine(), None
    if device.type == "cuda" and not dry:
        card = torch.cuda.get_device_name(device)
        total = int(torch.cuda.get_device_properties(device).total_memory)
    return {
        "step": MACHINE,
        "kind": MACHINE,
        "card": card,
        "device": str(device),
        "dry_run": dry,
        "gpu_bytes": total,
        "driver": None if dry else _smi("driver_version"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "host_bytes": int(psutil.virtual_memory().total),
        **{name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree, with a plus where files differ from it."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=7"]
    found = subprocess.run(words, capture_output=True, text=True)
    return found.stdout.strip() or None


def _smi(field: str, *options: str) -> str | None:
    """One field of nvidia-smi for the first GPU; None where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    words = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", *options]
    found = subprocess.run(words, capture_output=True, text=True)
    lines = found.stdout.splitlines()
    return lines[0].strip() if found.returncode == 0 and lines else None


class CardWatch:
    """The most memory that nvidia-smi counts on the whole card while the block runs.

    Args:
        device: of the block; only a GPU is watched.
        log: takes nvidia-smi's readings.

    Attributes:
        peak_bytes: the largest reading; None without nvidia-smi.
    """

    def __init__(self, device: torch.device, log: Path) -> None:
        self._watches = device.type == "cuda" and shutil.which("nvidia-smi") is not None
        self._index, self._log = device.index or 0, log
        self._process: subprocess.Popen[bytes] | None = None
        self.peak_bytes: int | None = None

    def __enter__(self) -> CardWatch:
        if self._watches:
            words = ["nvidia-smi", "-i", str(self._index), "--query-gpu=memory.used"]
            words += ["--format=csv,noheader,nounits", "-lms", "100"]
            with self._log.open("wb") as file:
                self._process = subprocess.Popen(words, stdout=file, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        time.sleep(0.3)  # the allocator gives nothing back by itself: one more reading
        self._process.terminate()
        self._process.wait()
        readings = [int(text) for text in self._log.read_text().split() if text.isdigit()]
        self.peak_bytes = max(readings) * _MIB if readings else None


def card_used_bytes() -> int | None:
    """Memory of the first card that is in use now, by nvidia-smi."""
    found = _smi("memory.used")
    return int(found) * _MIB if found is not None and found.isdigit() else None


def best_seconds(device: torch.device, run: Callable[[], object], *, repeat: int = 3) -> float:
    """Seconds of the fastest of several runs; one before them is not counted."""
    return min([once(device, run)[0] for _ in range(repeat + 1)][1:])


def once(device: torch.device, run: Callable[[], T]) -> tuple[float, T]:
    """Seconds of one run, the device's work included, and its result."""
    synchronize(device)
    started = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - started, result


def reset_peaks(device: torch.device) -> None:
    """Give cached memory back and begin all peaks anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if hasattr(torch.accelerator, "empty_host_cache"):
            torch.accelerator.empty_host_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if hasattr(torch._C, "_cuda_resetPeakHostMemoryStats") and device.type == "cuda":
        torch.cuda.reset_peak_host_memory_stats()
    with suppress(OSError):  # not Linux, or not allowed
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def reserved_peak_bytes(device: torch.device) -> int | None:
    """The most that torch's allocator has reserved since the peaks were reset."""
    return int(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else None


def pinned_peak_bytes(device: torch.device) -> int | None:
    """The most pinned host memory that torch has held, where it says so."""
    if device.type != "cuda" or not hasattr(torch._C, "_cuda_hostMemoryStats"):
        return None
    stats: dict[str, Any] = torch.cuda.host_memory_stats()
    for key in ("reserved_bytes.peak", "allocated_bytes.peak"):
        if key in stats:
            return int(stats[key])
    return None
