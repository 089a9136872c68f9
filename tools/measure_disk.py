"""Predicted against measured peak of the bytes on disk, for whole runs.

    python tools/measure_disk.py MODEL [MODEL ...] [--cases uniform per-layer ...] [--json FILE]

Each case is one command that writes into an empty folder: prunes of several layouts and methods, an
adaptation, an export. Files only shrink when something is removed or replaced, so all files are
counted just before every such event (an audit hook of Python reports it): the peak is exact.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK_BYTES = 4096
_EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


@dataclass
class DiskMeter:
    """Counts the bytes of all files below a folder, in blocks.

    Attributes:
        folder: Folder that is counted.
        peak_bytes: Largest sum so far.
        at_peak: Bytes by folder and name without its numbers, at the peak.
    """

    folder: Path
    peak_bytes: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)

    def measure(self) -> None:
        """Count all files now."""
        sizes = Counter[str]()
        for path in self.folder.rglob("*"):
            try:
                size = path.stat().st_size if path.is_file() else 0
            except FileNotFoundError:
                continue
            sizes[_kind(path.relative_to(self.folder))] += -(-size // BLOCK_BYTES) * BLOCK_BYTES
        if sum(sizes.values()) > self.peak_bytes:
            self.peak_bytes, self.at_peak = sum(sizes.values()), dict(sizes.most_common())


_meters: list[DiskMeter] = []


def _on_event(event: str, _: tuple[object, ...]) -> None:
    if event in _EVENTS:
        for meter in _meters:
            meter.measure()


@contextmanager
def measured_disk(folder: Path) -> Iterator[DiskMeter]:
    """Measure the files below a folder while the block runs."""
    if not hasattr(sys, "_frugal_bonsai_hook"):  # a hook of Python cannot be taken away
        sys.addaudithook(_on_event)
        sys._frugal_bonsai_hook = True  # type: ignore[attr-defined]
    meter = DiskMeter(folder)
    _meters.append(meter)
    try:
        yield meter
        meter.measure()
    finally:
        _meters.remove(meter)


def _kind(path: Path) -> str:
    """Return a file's folder and the first word of its name, without numbers."""
    parent = path.parent.as_posix().partition(".partial")[0]
    name = path.name.removeprefix(".")
    return f"{parent}/{name.split('_')[0].split('.')[0].split('-')[0]}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A prune of this tool: its layout, method and settings."""

    layout: str = "per-layer"
    method: str = "default"
    settings: dict[str, Any] = field(default_factory=dict)


_ROUNDS = {"sparsity": 0.4, "step": 0.15}
CASES = {
    "per-layer": Case(settings=_ROUNDS),
    "native": Case(settings={**_ROUNDS, "weights": "native"}),
    "int8": Case(settings={**_ROUNDS, "arithmetic": "int8"}),
    "outputs": Case(settings={**_ROUNDS, "refit": "outputs"}),
    "uniform": Case(layout="uniform", settings=_ROUNDS),
    "padded": Case(layout="padded", settings=_ROUNDS),
    "local-only": Case(method="local-only", settings={"sparsity": 0.4}),
    "no-recovery": Case(settings={**_ROUNDS, "recovery": False}),
    "fluctuation": Case(method="fluctuation", settings={"sparsity": 0.4}),
    "paper": Case(method="paper", settings={"sparsity": 0.15, "masks": 8, "mask_windows": 4}),
}


def measure_prune(model: str, case: Case, folder: Path) -> dict[str, Any]:
    """Prune a model into a folder; return the measured peak and the plan's."""
    from frugal_bonsai.memory.plan import MemoryPlan
    from frugal_bonsai.run.options import PruneOptions
    from frugal_bonsai.run.prune import prune

    plans: list[MemoryPlan] = []
    options = PruneOptions(
        method=case.method,
        settings=case.settings,
        layout=case.layout,
        calibration="stdlib",
        windows=12,
        window=128,
        max_cpu_mem="2GB",
        device="cpu",
    )
    with measured_disk(folder) as meter:
        prune(model, folder / "out", options, on_plan=plans.append)
    return _result(meter, plans[0].total_bytes("disk"))


def measure_adapt(model: str, folder: Path) -> dict[str, Any]:
    """Adapt a model, as if pruned, to itself; return the measured peak and the plan's."""
    from frugal_bonsai.run.adapt import adapt
    from frugal_bonsai.run.adapt_plan import plan_adapt
    from frugal_bonsai.run.options import AdaptOptions

    options = AdaptOptions(
        teacher=model,
        data=("stdlib",),
        windows=40,
        window=128,
        settings={"tokens": 4096},
        max_cpu_mem="2GB",
        device="cpu",
    )
    planned = plan_adapt(model, options, folder / "out.run")
    with measured_disk(folder) as meter:
        adapt(model, folder / "out", options)
    return _result(meter, planned["totals"]["disk"])


def _result(meter: DiskMeter, predicted_bytes: int) -> dict[str, Any]:
    return {
        "measured": meter.peak_bytes,
        "predicted": predicted_bytes,
        "files": meter.at_peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="predicted against measured bytes on disk")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--cases", nargs="*", default=[*CASES, "adapt"])
    parser.add_argument("--json", help="write the results to this file too")
    options = parser.parse_args()
    print("| model | case | predicted KiB | measured KiB | predicted / measured |")
    print("|---|---|---|---|---|")
    results = []
    for model in options.models:
        for name in options.cases:
            with tempfile.TemporaryDirectory(prefix="measure-disk-") as scratch:
                folder = Path(scratch)
                found = (
                    measure_adapt(model, folder)
                    if name == "adapt"
                    else measure_prune(model, CASES[name], folder)
                )
            results.append({"model": Path(model).name, "case": name, **found})
            kib = (found["predicted"] / 1024, found["measured"] / 1024)
            row = f"{kib[0]:,.0f} | {kib[1]:,.0f} | {kib[0] / kib[1]:.3f}"
            print(f"| {Path(model).name} | {name} | {row} |", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
