"""Five training steps in each way that ``adapt`` holds the student."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from frugal_bonsai.int8 import has_bitsandbytes
from frugal_bonsai.memory.meter import peak_resident_bytes
from frugal_bonsai.run.adapt import adapt as run_adapt
from frugal_bonsai.run.options import AdaptOptions
from gpu_checks.check import Check
from gpu_checks.machine import pinned_peak_bytes, reserved_peak_bytes, reset_peaks

# Training steps of a measurement, and of a dry run.
_STEPS, _DRY_STEPS = 5, 2
# How frozen weights are held, settings of the training.
_WAYS: tuple[tuple[str, str | None, dict[str, Any]], ...] = (
    ("native", "native", {}),
    ("int8", "int8", {}),
    ("streamed", "streamed", {}),
    ("full", None, {"method": "full"}),
)


def adapt(check: Check, variant: str | None = None) -> None:
    """Adapt the example that an earlier step pruned, or the example to itself."""
    ways = list(_WAYS)
    if not check.dry and has_bitsandbytes():
        ways.append(("int8, 8-bit moments", "int8", {"optimiser": "adamw8bit"}))
    pruned = check.work / "example-uniform-device"
    model = str(pruned) if pruned.exists() else "example"
    for name, weights, settings in ways:
        if check.left_seconds() < 3:
            check.skip(name, "the step's time is used up")
            continue
        with check.part(name):
            _train(check, model, name, weights, settings)


def _train(
    check: Check, model: str, name: str, weights: str | None, settings: dict[str, Any]
) -> None:
    window, batch = (32, 2) if check.dry else (256, 8)
    steps = _DRY_STEPS if check.dry else _STEPS
    tokens = {"tokens": steps * batch * window, "batch": batch, "evaluations": 1}
    reset_peaks(check.device)
    out = check.work / f"adapted-{name.partition(',')[0]}-{len(settings)}"
    summary = run_adapt(
        model,
        out,
        AdaptOptions(
            teacher="example",
            data=("stdlib",),
            weights=weights,
            settings={"rank": 8, **tokens, **settings},
            teacher_cache=check.work / "teacher",
            window=window,
            windows=8 if check.dry else 64,
            device=str(check.device),
        ),
    )
    training, after = summary["training"], summary["after"]["perplexity"]
    check.figure(
        "short trainings",
        held=name,
        model=Path(model).name,
        steps=training["steps"],
        optimiser=training["optimiser"],
        micro_batch=training["micro_batch"],
        perplexity_before=summary["before"]["perplexity"],
        perplexity_after=after,
        finite=math.isfinite(after) and training["stopped"] is None,
        training_seconds=training["seconds"],
        gpu_reserved_bytes=reserved_peak_bytes(check.device),
        host_peak_bytes=peak_resident_bytes(),
        pinned_bytes=pinned_peak_bytes(check.device),
    )
