"""The tests marked ``gpu``, and what a sweep and recovery of an 8B shape take under small caps."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from typing import Any

import torch
from bench_streaming import HalfOff

from frugal_bonsai.accelerator import synchronize
from frugal_bonsai.bonsai.importance.scores import ImportanceBuilder
from frugal_bonsai.bonsai.reconstruction.layer_pass import ReconstructionOptions
from frugal_bonsai.bonsai.reconstruction.reconstruct import Reconstruction
from frugal_bonsai.memory.budget import make_budget, parse_caps
from frugal_bonsai.memory.meter import peak_gpu_bytes, peak_resident_bytes
from frugal_bonsai.memory.plan import MemoryPlan, PruneWorkload, plan_memory
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.run.engine import make_engine, measured_base_bytes
from frugal_bonsai.run.open import Model
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.store import INT8, LayerStore
from gpu_checks.check import ROOT, TAIL_LINES, Check
from gpu_checks.machine import (
    CardWatch,
    card_used_bytes,
    pinned_peak_bytes,
    reset_peaks,
)
from gpu_checks.models import int8_store, large, opened, random_tokens
from gpu_checks.processes import child_environment

_RESULT = re.compile(r"^(tests/\S+?)(?:::(\S+))? (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
_CAPS = ("8GB", "12GB", "24GB")


def tests(check: Check, variant: str | None = None) -> None:
    """Run the tests that need a GPU; one figure a test as it ends."""
    where = "tests/stream/test_gpu_caps.py" if check.dry else "tests/stream"
    words = [sys.executable, "-m", "pytest", "-m", "gpu", where, "-v", "--color=no"]
    words += ["-p", "no:cacheprovider", "--durations=5"]
    started = time.perf_counter()
    failed: list[str] = []
    last: list[str] = []
    with subprocess.Popen(
        words,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=child_environment({}),
    ) as process:
        assert process.stdout is not None
        for text in process.stdout:
            last = [*last, text.rstrip()][-40:]
            found = _RESULT.match(text)
            if found is None:
                continue
            file, test, result = found.groups()
            seconds = time.perf_counter() - started
            check.figure(
                "tests", file=file, test=test, result=result.lower(), done_after_seconds=seconds
            )
            if result in ("FAILED", "ERROR"):
                failed.append(test)
    with check.part("pytest"):
        if process.returncode:
            raise AssertionError(
                f"pytest ended with {process.returncode}, failed: {failed}\n"
                + "\n".join(last[-TAIL_LINES:])
            )


def caps(check: Check, variant: str | None = None) -> None:
    """Statistics, masks and recovery of an 8B shape under each cap: planned against used."""
    idle = None if check.dry else card_used_bytes()  # this process has no context yet
    with opened(check, large(check)) as model, int8_store(check, model) as store:
        for cap in _CAPS:
            if check.left_seconds() < (1 if check.dry else 8):
                check.skip(f"cap of {cap}", "the step's time is used up")
                continue
            with check.part(f"cap of {cap}"):
                _under_cap(check, model, store, cap, idle)


def _under_cap(
    check: Check, model: Model, store: LayerStore, cap: str, idle_bytes: int | None
) -> None:
    window, windows = (32, 4) if check.dry else (2048, 16)
    work = PruneWorkload(
        window=window,
        windows=windows,
        measured=(2,),
        weights=INT8,
        source_bytes=2,
        goals=(0.5,),
        part_windows=windows,
        mask_windows=windows,
        mask_batches=(1,),
        reconstruction=True,
        refit_inputs=True,
    )
    device = check.device
    reset_peaks(device)
    budget = make_budget(device, parse_caps(cap, None))
    base = measured_base_bytes(model.spec)
    plan = plan_memory(model.spec, budget, work, base_bytes=base)
    started = time.perf_counter()
    with CardWatch(device, check.work / f"card-{cap}.txt") as watch:
        try:
            engine = make_engine(model, plan, device, None)
            _sweep_and_recover(engine, store, plan, work)
            synchronize(device)
            seconds = time.perf_counter() - started
        finally:
            if device.type == "cuda":
                torch.cuda.set_per_process_memory_fraction(1.0, device)
    on_card = watch.peak_bytes
    check.figure(
        "an 8B shape under caps",
        cap=cap,
        gpu_planned_bytes=plan.total_bytes("gpu"),
        gpu_peak_bytes=peak_gpu_bytes(device, budget.context_bytes),
        context_bytes=budget.context_bytes if check.on_gpu else None,
        nvidia_smi_bytes=None if on_card is None else on_card - (idle_bytes or 0),
        idle_bytes=idle_bytes,
        host_planned_bytes=plan.total_bytes("host"),
        host_peak_bytes=peak_resident_bytes(),
        pinned_bytes=pinned_peak_bytes(device),
        micro_batch=f"{plan.limits.micro_batch} to {engine.sweep.batches.size}",
        resident_windows=plan.limits.resident_windows,
        seconds=seconds,
    )


def _sweep_and_recover(
    engine: Engine, store: LayerStore, plan: MemoryPlan, work: PruneWorkload
) -> None:
    """The sweeps of a round: prior, masked losses, recovery."""
    mask, some = KeepMask(engine.spec.table), random_tokens(engine.spec, work.windows, work.window)
    prior = ImportanceBuilder("exact", mask, damping=1e-3, generator=torch.Generator())
    with engine.stream(store) as stream:
        engine.sweep.run(stream, some, tap=prior)
        engine.sweep.losses(stream, engine.head, some.repeat(2, 1), masker=HalfOff())
    options = ReconstructionOptions(
        ridge=1e-3,
        mask=mask,
        keep_inputs=plan.keep_inputs,
        saved_dtype=lambda name: torch.bfloat16,
    )
    reconstruction = Reconstruction(engine.sweep, options, save=_forget)
    with engine.dense_stream(store) as dense, engine.dense_stream(store) as pruned:
        result = reconstruction.run(dense, pruned, some, prior)
    with torch.inference_mode():
        engine.head.nll(result.hidden_pruned, some)
        engine.head.nll(result.hidden_dense, some)


def _forget(layer: int, weights: Any) -> None:
    """Refitted weights are not kept."""
