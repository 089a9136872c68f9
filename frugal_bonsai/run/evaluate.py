"""``eval``: perplexity of a dense or pruned model, streamed under the same caps."""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from frugal_bonsai.progress import Progress, Silent
from frugal_bonsai.run.prepare import (
    choose_window,
    make_engine,
    measured_base_bytes,
    note_assumed,
    open_model,
    read_windows,
)
from frugal_bonsai.run.summary import describe_memory


def evaluate(
    model: str,
    text: str,
    *,
    window: int | None = None,
    windows: int | None = None,
    weights: str = "native",
    max_gpu_mem: str | int | None = None,
    max_cpu_mem: str | int | None = None,
    device: str | None = None,
    assume_family: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity on a text, as plain values.

    Args:
        model: folder, hub id or ``example``; dense or pruned, either layout.
        text: file, JSON lines, hub data set or ``stdlib``.
        window: tokens of a window; None takes 2,048 or the model's positions.
        windows: evaluate only the first ones.
        weights: ``native`` streams the checkpoint as it is, ``int8`` a quantised working copy.
        max_gpu_mem: cap on device memory.
        max_cpu_mem: cap on resident memory.
        device: None takes a GPU where there is one.
        assume_family: the family that an architecture without a table is like.
        progress: told of each layer visit.

    Raises:
        FrugalBonsaiError: anything that the user can mend.
    """
    from frugal_bonsai.evaluation.perplexity import measure_perplexity
    from frugal_bonsai.memory.budget import find_device, make_budget
    from frugal_bonsai.memory.plan import SweepWorkload, plan_memory
    from frugal_bonsai.model.tied_head import require_tied_head
    from frugal_bonsai.stream.store import INT8, build_store

    started = time.monotonic()
    progress = progress or Silent()
    with open_model(model, assume_family=assume_family) as opened, ExitStack() as stack:
        note_assumed(opened, progress)
        spec = opened.spec
        require_tied_head(opened.checkpoint, spec)
        window = choose_window(spec, window)
        name, windows_NS = read_windows(opened, text, window, windows=windows, option="--text")
        place = find_device(device)
        budget = make_budget(place, max_gpu_mem, max_cpu_mem)
        int8 = weights == INT8
        work = SweepWorkload(
            window=window, measured=(len(windows_NS),), weights=weights if int8 else None
        )
        base = measured_base_bytes(spec)
        plan = plan_memory(spec, budget, work, base_bytes=base)
        engine = make_engine(opened.checkpoint, spec, plan, place, progress or Silent())
        if int8:
            folder = Path(tempfile.mkdtemp(prefix="frugal-bonsai-"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            store = build_store(
                folder, opened.checkpoint, spec, weights=weights, device=place, progress=progress
            )
            stream = stack.enter_context(engine.stream(store))
        else:
            stream = stack.enter_context(engine.native())
        measured = measure_perplexity(engine, stream, windows_NS)
        seconds = time.monotonic() - started
        return {
            "model": model,
            "text": name,
            "window": window,
            "windows": len(windows_NS),
            "tokens": measured.tokens,
            "perplexity": measured.value,
            "nll": measured.nll,
            "weights": weights,
            "seconds": seconds,
            "tokens_per_second": windows_NS.numel() / seconds,
            **describe_memory(plan, engine),
            "notes": list(budget.notes),
        }
