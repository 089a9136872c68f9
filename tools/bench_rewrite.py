"""Speed of the rewriter against ``cp``, and the memory that it needs.

Runs in turn, `--repeat` times, on a checkpoint whose files are in the page cache:

    cp      `cp` of the weight files, then fsync of the copies
    whole   `shrink` with a mask that removes nothing: reads and writes the same bytes, fsync too
    half    `shrink` with a mask that removes every second unit: reads all, writes what stays
    probe   one thread reads and writes the same bytes through a buffer, without fsync

Speeds are bytes of the source per second, and shares of cp's (of medians). Before each run the last
output is removed and the disk's queue is drained. A rewrite runs in a separate process and is timed
without the imports; its memory is the peak above the memory before. `cp` copies inside the system;
`probe` shows the speed of a program that reads the bytes that it copies.

    python tools/make_shape_checkpoint.py llama-3.2-1b M
    python tools/bench_rewrite.py M [--repeat 5]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.mask_file import write_mask
from frugal_bonsai.run.open import open_model
from frugal_bonsai.sizes import format_bytes

WORKER = """
import json, sys, time
from pathlib import Path
import numpy, torch, transformers
from frugal_bonsai.memory.meter import peak_resident_bytes, resident_bytes
from frugal_bonsai.run.open import open_model
from frugal_bonsai.run.shrink import shrink
from frugal_bonsai.rewrite import shrink as _
model, mask, out = sys.argv[1:]
Path("/proc/self/clear_refs").write_text("5")
before = resident_bytes()
started = time.perf_counter()
shrink(model, mask, out)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "peak_bytes": peak_resident_bytes() - before}))
"""


def write_masks(model: str, folder: Path) -> dict[str, Path]:
    """A mask that removes nothing, and one that removes every second unit."""
    paths = {}
    with open_model(model, headers_only=True) as opened:
        for name, step in (("whole", None), ("half", 2)):
            mask = KeepMask(opened.spec.table)
            for group in opened.spec.table.groups:
                if step is not None:
                    mask.of(group)[1::step] = False
            paths[name] = folder / f"{name}.json"
            write_mask(paths[name], "bench", opened.spec, mask)
    return paths


def rewrite(model: str, mask: Path, out: Path) -> dict[str, float]:
    """Run one rewrite in a separate process."""
    done = subprocess.run(
        [sys.executable, "-c", WORKER, model, str(mask), str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def copy(files: list[Path], out: Path) -> dict[str, float]:
    """`cp` and fsync."""
    out.mkdir()
    started = time.perf_counter()
    subprocess.run(["cp", *map(str, files), str(out)], check=True)
    for file in out.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return {"seconds": time.perf_counter() - started}


def probe(files: list[Path], out: Path) -> dict[str, float]:
    """Read and write through a buffer of 8 MiB."""
    out.mkdir()
    buffer = bytearray(2**23)
    view = memoryview(buffer)
    started = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as source, (out / file.name).open("wb", 0) as target:
            while count := source.readinto(buffer):
                target.write(view[:count])
    return {"seconds": time.perf_counter() - started}


def measure(model: str, repeat: int, work: Path) -> dict[str, list[dict[str, float]]]:
    """Every figure's runs, in turn."""
    with open_model(model, headers_only=True) as opened:
        files = sorted({entry.file for entry in opened.checkpoint.tensors.values()})
    masks, out = write_masks(model, work), work / "out"
    figures: dict[str, Callable[[], dict[str, float]]] = {
        "cp": lambda: copy(files, out),
        "whole": lambda: rewrite(model, masks["whole"], out),
        "half": lambda: rewrite(model, masks["half"], out),
        "probe": lambda: probe(files, out),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in figures}
    for _ in range(repeat + 1):  # the first fills the page cache and is not counted
        for name, run in figures.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            runs[name].append(run())
    return {name: found[1:] for name, found in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--dir", type=Path, help="on the disk to write to; beside MODEL if left out"
    )
    given = parser.parse_args()
    with open_model(given.model, headers_only=True) as opened:
        source_bytes = opened.checkpoint.weight_bytes
        largest = max(entry.size_bytes for entry in opened.checkpoint.tensors.values())
        place = given.dir or opened.folder.resolve().parent
    with tempfile.TemporaryDirectory(dir=place) as work:
        runs = measure(given.model, given.repeat, Path(work))
    seconds = {name: [run["seconds"] for run in found] for name, found in runs.items()}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{given.model}: {format_bytes(source_bytes)}, largest tensor {format_bytes(largest)}")
    for name, values in seconds.items():
        rate = source_bytes / median[name] / 1e6
        print(
            f"{name:6} {median[name]:6.2f} s ({min(values):.2f} to {max(values):.2f}), "
            f"{rate:6.0f} MB of the source a second, {median['cp'] / median[name]:.2f} of cp"
        )
    for name in ("whole", "half"):
        peak = max(int(run["peak_bytes"]) for run in runs[name])
        print(f"{name}: peak {format_bytes(peak)} above the process with its imports")


if __name__ == "__main__":
    main()
