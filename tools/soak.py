"""Run hundreds of rounds in one process: memory, open files, threads and folders must not grow.

    python tools/soak.py [--rounds 300] [--seed 0]

Prunes a tiny model again and again, several rounds each, every tenth time stopped and resumed, and
adapts, shrinks, exports and measures now and then. After each prune it reads resident memory, open
files, threads, child processes and what is left in the folders. The first quarter warms up. It
fails if the mean of the last quarter is above that of the second by more than 1 MiB a hundred
rounds, or if there are more files, threads or children. Prints a table. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import tempfile
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tools"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from fuzzing.samples import QUICK, StopAt, make_models  # noqa: E402  # nothing is installed

from frugal_bonsai.bonsai.settings import STATE_FILE  # noqa: E402
from frugal_bonsai.memory.budget import return_freed_memory  # noqa: E402

MOST_GROWTH_BYTES = 2**20  # in a hundred rounds


@dataclass(frozen=True)
class Reading:
    """What the process holds.

    Attributes:
        rounds: rounds so far.
        resident_bytes: resident memory.
        files: open file descriptors.
        threads: threads.
        children: child processes.
        left: files and folders in the working folder and the temporary one.
    """

    rounds: int
    resident_bytes: int
    files: int
    threads: int
    children: int
    left: int


def read(rounds: int, *places: Path) -> Reading:
    """Read what this process holds now."""
    gc.collect()
    return_freed_memory()
    process = psutil.Process()
    return Reading(
        rounds,
        process.memory_info().rss,
        process.num_fds(),
        process.num_threads(),
        len(process.children()),
        sum(1 for place in places for _ in place.rglob("*")),
    )


def run_once(model: Path, place: Path, at: int, seed: int) -> int:
    """Prune once, and run another command; leave nothing; return the number of rounds."""
    from frugal_bonsai.run.evaluate import evaluate
    from frugal_bonsai.run.export import export_gguf
    from frugal_bonsai.run.options import EvalOptions
    from frugal_bonsai.run.prune import prune
    from frugal_bonsai.run.shrink import shrink

    out, options = place / f"out-{at}", {**QUICK, "step": 0.1, "seed": seed + at}
    resumed = at % 10 == 9
    if resumed:
        try:
            prune(str(model), out, progress=StopAt("masked evaluation", number=2), **options)
        except KeyboardInterrupt:
            assert (place / f"out-{at}.run" / STATE_FILE).exists()
    rounds = len(prune(str(model), out, progress=False, resume=resumed, **options)["rounds"])
    if at % 5 == 0:
        mask = out / "pruning_mask.json"
        shrink(str(model), mask, place / "shrunk", layout="per-layer")
        export_gguf(str(place / "shrunk"), place / "shrunk.gguf")
        measured = EvalOptions(text="stdlib", window=32, windows=2, max_cpu_mem="4GB", device="cpu")
        evaluate(str(out), measured, progress=False)
    remove(place, model)
    return rounds


def remove(place: Path, model: Path) -> None:
    """Remove the outputs; a run directory that is left stays, and is counted."""
    for path in place.iterdir():
        if path.suffix == ".run" or path in (model, *model.parents):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def growth(readings: list[Reading]) -> list[str]:
    """Return what has grown; empty if nothing has."""
    quarter = len(readings) // 4
    early, late = readings[quarter : 2 * quarter], readings[-quarter:]
    found = []
    for field in fields(Reading)[1:]:
        before, after = (
            sum(getattr(reading, field.name) for reading in part) / len(part)
            for part in (early, late)
        )
        most = 0.0
        if field.name == "resident_bytes":
            most = MOST_GROWTH_BYTES * (late[-1].rounds - early[0].rounds) / 100
        if after > before + most:
            found.append(f"{field.name}: {before:,.1f} to {after:,.1f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        place, scratch = Path(temporary) / "work", Path(temporary) / "tmp"
        place.mkdir()
        scratch.mkdir()
        tempfile.tempdir = str(scratch)
        (model,) = make_models(Path(temporary) / "models", ("llama",))
        readings, rounds = list[Reading](), 0
        while rounds < given.rounds:
            rounds += run_once(model, place, len(readings), given.seed)
            readings.append(read(rounds, place, scratch))
    names = [field.name for field in fields(Reading)]
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for reading in readings[:: max(1, len(readings) // 20)] + readings[-1:]:
        print("| " + " | ".join(f"{value:,}" for value in astuple(reading)) + " |")
    grown = growth(readings)
    print("grown: " + "; ".join(grown) if grown else "nothing has grown")
    sys.exit(bool(grown))


if __name__ == "__main__":
    main()
