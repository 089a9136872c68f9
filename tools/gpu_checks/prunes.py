"""Whole prunes: the example on the GPU and on the CPU, and an 8B shape against its prediction."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.model.layout import PER_LAYER, UNIFORM
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.progress import Silent
from frugal_bonsai.rewrite.mask_file import read_mask
from frugal_bonsai.run.open import open_model
from frugal_bonsai.run.options import PruneOptions
from frugal_bonsai.run.profile import profile
from frugal_bonsai.run.prune import prune
from gpu_checks.check import Check
from gpu_checks.machine import pinned_peak_bytes, reset_peaks
from gpu_checks.models import large, opened

MASK_FILE = "pruning_mask.json"
# Seconds that the thorough profile takes with what must follow it.
_THOROUGH_SECONDS = 90
# Beginning of a sweep's name -> phase of the time estimate that it belongs to.
_PHASES = {
    "dense: held-out": "perplexity",
    "pruned: held-out": "perplexity",
    "writing the working store": "building stores",
    "statistics": "statistics",
    "masked evaluation": "masked evaluation",
    "recovery": "recovery",
    "trial": "recovery",
    "refinement": "recovery",
    "verify": "rewriting",
}


class Stopwatch(Silent):
    """Adds up the seconds from the beginning of each sweep to that of the next, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._phase, self._since = "starting", time.perf_counter()

    def sweep(self, name: str, steps: int, tokens_per_step: int) -> None:
        """A sweep begins, so the one before it is over."""
        self.stop()
        found = [phase for start, phase in _PHASES.items() if name.startswith(start)]
        self._phase = found[0] if found else name.partition(",")[0]

    def stop(self) -> None:
        """Count what has passed since the last sweep began."""
        now = time.perf_counter()
        self.seconds[self._phase] += now - self._since
        self._since = now


def example(check: Check, variant: str | None = None) -> None:
    """Prune ``example`` on both devices with the same options; compare the kept units."""
    for layout in (UNIFORM,) if check.dry else (UNIFORM, PER_LAYER):
        outs: list[Path] = []
        for role, device in (("device", str(check.device)), ("reference", "cpu")):
            if check.left_seconds() < 10:
                check.skip(f"{layout} on {device}", "the step's time is used up")
                continue
            with check.part(f"{layout} on {device}"):
                out = check.work / f"example-{layout}-{role}"
                _prune_example(check, layout, device, out)
                outs.append(out)
        if len(outs) == 2:
            with check.part(f"{layout}: masks"):
                _compare_masks(check, layout, *outs)


def _prune_example(check: Check, layout: str, device: str, out: Path) -> None:
    # The model writes text of its own in the prune of `predicted`, so here it need not.
    dry = {"masks": 2, "mask_windows": 2, "step": 0.5, "refine": 1, "self_windows": 0}
    summary = prune(
        "example",
        out,
        PruneOptions(
            layout=layout,
            device=device,
            calibration="stdlib",
            window=32 if check.dry else 256,
            windows=4 if check.dry else 64,
            settings={"arithmetic": "float", **(dry if check.dry else {})},
        ),
    )
    check.figure(
        "prunes of example",
        layout=layout,
        device=device,
        removed=summary["sparsity"],
        perplexity_before=summary["before"]["perplexity"],
        perplexity_after=summary["after"]["perplexity"],
        verified_within=summary["verify"]["max_relative_difference"],
        forward_tokens=summary["forward_tokens"],
        micro_batch=summary["memory"]["final_micro_batch"],
        seconds=summary["seconds"],
    )


def _compare_masks(check: Check, layout: str, first: Path, second: Path) -> None:
    with open_model("example", headers_only=True) as model:
        masks = [read_mask(out / MASK_FILE, model.spec) for out in (first, second)]
        for kind in model.spec.table.kinds:
            groups = [group for group in model.spec.table.groups if group.kind == kind]
            agreed = sum(int((masks[0].of(group) == masks[1].of(group)).sum()) for group in groups)
            units = sum(group.count for group in groups)
            check.figure(
                "masks of both devices",
                layout=layout,
                units=kind,
                same=agreed == units,
                agreement=agreed / units,
                kept_by_first=_kept(masks[0], groups),
                kept_by_second=_kept(masks[1], groups),
            )


def _kept(mask: KeepMask, groups: list[Any]) -> str:
    """Units kept, layer by layer."""
    return " ".join(str(mask.kept(group)) for group in groups)


def predicted(check: Check, variant: str | None = None) -> None:
    """Measure this machine, then prune an 8B shape: predicted against measured time and memory."""
    toml = check.out / f"gpu_check_{'dry' if check.dry else check.device.type}.toml"
    quick = check.dry or check.left_seconds() < _THOROUGH_SECONDS
    started = time.perf_counter()
    rates = profile(out=toml, device=str(check.device), folder=check.work, quick=quick)
    check.figure("profile", rate="seconds to measure it", value=time.perf_counter() - started)
    products = {f"products.{kind}": rate for kind, rate in rates.pop("products").items()}
    for name, rate in {**rates, **products}.items():
        if isinstance(rate, (int, float)):
            check.figure("profile", rate=name, value=rate)
    shape = large(check)
    with opened(check, shape):
        pass  # it is written before a prune is timed
    for layout in (PER_LAYER,) if check.dry else (UNIFORM, PER_LAYER):
        if check.left_seconds() < (5 if check.dry else 20):
            check.skip(layout, "the step's time is used up")
            continue
        with check.part(layout):
            _prune_predicted(check, layout, toml, check.work / f"llama-{shape.name}")


def _prune_predicted(check: Check, layout: str, toml: Path, model: Path) -> None:
    window, windows = (32, 4) if check.dry else (2048, 16)
    masks = {"masks": 2, "mask_windows": 2} if check.dry else {"masks": 8, "mask_windows": 8}
    if check.dry:
        masks |= {"refine": 1}
    plans: list[MemoryPlan] = []
    watch, out = Stopwatch(), check.work / f"{model.name}-{layout}"
    reset_peaks(check.device)
    summary = prune(
        str(model),
        out,
        PruneOptions(
            layout=layout,
            device=str(check.device),
            calibration="stdlib",
            window=window,
            windows=windows,
            profile=toml,
            settings={"step": 0.5, **masks},
        ),
        progress=watch,
        on_plan=plans.append,
    )
    watch.stop()
    memory, expected = summary["memory"], summary["predicted"]
    rows = {row["name"]: row for row in expected["phases"]}
    check.figure(
        "prunes of an 8B shape",
        model=f"{model.name}, 4 layers, {windows} windows of {window}",
        layout=layout,
        predicted_seconds=expected["seconds"] - rows["starting"]["seconds"],
        seconds=summary["seconds"],
        forward_tokens=summary["forward_tokens"],
        gpu_planned_bytes=memory["gpu_predicted_bytes"],
        gpu_peak_bytes=memory["gpu_peak_bytes"],
        host_planned_bytes=memory["host_predicted_bytes"],
        host_peak_bytes=memory["host_peak_bytes"],
        pinned_bytes=pinned_peak_bytes(check.device),
        micro_batch=f"{memory['planned_micro_batch']} to {memory['final_micro_batch']}",
        verified_within=summary["verify"]["max_relative_difference"],
    )
    for phase in {**rows, **watch.seconds}:
        row = rows.get(phase, {})
        check.figure(
            "phases of these prunes",
            layout=layout,
            phase=phase,
            predicted_seconds=row.get("seconds"),
            measured_seconds=watch.seconds.get(phase),
            binds=row.get("binds"),
        )
    shutil.rmtree(out)
