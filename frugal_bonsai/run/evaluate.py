"""``eval``: measure a dense or pruned model, streamed under the caps.

The perplexity on a text is measured here. For scores on tasks see
:mod:`frugal_bonsai.run.evaluate_tasks`, for ``--runtime llama.cpp``
:mod:`frugal_bonsai.run.evaluate_gguf`.

In: a model, a text or tasks. Out: perplexity, scores and what they took, as plain values. With int8
weights a working copy lies in a temporary folder meanwhile.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.evaluation.harness import load_tasks, split_names
from frugal_bonsai.evaluation.llama_cpp import LLAMA_CPP
from frugal_bonsai.evaluation.perplexity import measure_perplexity
from frugal_bonsai.memory.budget import Caps, find_device, make_budget
from frugal_bonsai.memory.disk import RUN
from frugal_bonsai.memory.plan import MemoryPlan, SweepWorkload, plan_memory
from frugal_bonsai.model.tied_head import require_tied_head
from frugal_bonsai.progress import Progress
from frugal_bonsai.report.bar import choose_progress
from frugal_bonsai.run.disk_room import require_room
from frugal_bonsai.run.early import check_eval
from frugal_bonsai.run.engine import make_engine, measured_base_bytes
from frugal_bonsai.run.evaluate_gguf import evaluate_gguf
from frugal_bonsai.run.evaluate_tasks import evaluate_tasks
from frugal_bonsai.run.keywords import one_of
from frugal_bonsai.run.open import Model, note_model, open_model
from frugal_bonsai.run.options import EvalOptions
from frugal_bonsai.run.summary import describe_memory
from frugal_bonsai.run.texts import (
    bytes_per_token,
    choose_window,
    read_windows,
    require_stride,
)
from frugal_bonsai.run.weights import open_layers
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.store import INT8

STREAMED = "streamed"


def evaluate(
    model: str,
    options: EvalOptions | None = None,
    *,
    progress: Progress | bool | None = None,
    **named: Any,
) -> dict[str, Any]:
    """Measure the perplexity of a model on a text, its scores on tasks, or both.

    Args:
        model: Folder, GGUF file, hub id or ``example``; dense or pruned, any layout.
        options: What to measure, and within which caps, as one object instead of keywords.
        progress: Told of each layer visit. None shows a bar in notebooks, False nothing.
        named: Options by name: those of ``frugal-bonsai eval``, with underscores.

    Returns:
        Plain values (what ``eval --json`` prints).

    Raises:
        FrugalBonsaiError: The user can mend it.
    """
    started, progress = time.monotonic(), choose_progress(progress)
    options = one_of(EvalOptions, named, options)
    files = check_eval(model, options)
    if options.runtime == LLAMA_CPP:
        assert options.text is not None  # checked above
        cut = {"window": options.window, "windows": options.windows, "stride": options.stride}
        return evaluate_gguf(model, options.text, **cut, progress=progress)
    names = split_names(options.tasks)
    loaded = load_tasks(names, files) if names else None
    place: dict[str, Any] = {
        "device": find_device(options.device),
        "caps": options.caps,
        "progress": progress,
    }
    values: dict[str, Any] = {"model": model, "runtime": STREAMED, "weights": options.weights}
    with open_model(model, assume_family=options.assume_family) as opened:
        note_model(opened, progress)
        require_tied_head(opened.checkpoint, opened.spec)
        if options.text is not None:
            values |= _measure(opened, options.text, options, **place)
        if loaded is not None:
            store = INT8 if options.weights == INT8 else None
            scored, _ = evaluate_tasks(
                opened, loaded, limit=options.limit, window=options.window, weights=store, **place
            )
            values |= _with_larger_plan(scored, values)
    seconds = time.monotonic() - started
    tokens = values.get("windows", 0) * values.get("window", 0) + values.get("task_tokens", 0)
    return values | {"seconds": seconds, "tokens_per_second": tokens / seconds}


def _with_larger_plan(later: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Return the later values, with the earlier prediction of memory if that is larger."""
    key = "host_predicted_bytes"
    if earlier.get(key, 0) <= later[key]:
        return later
    return later | {name: earlier[name] for name in (key, "gpu_predicted_bytes", "plan")}


def _measure(
    model: Model,
    text: str,
    options: EvalOptions,
    *,
    device: torch.device,
    caps: Caps,
    progress: Progress,
) -> dict[str, Any]:
    """Measure the perplexity within a memory plan; return both as plain values."""
    window, stride = choose_window(model.spec, options.window), options.stride
    require_stride(stride, window)
    name, windows_NS = read_windows(
        model, text, window, windows=options.windows, option="--text", stride=stride
    )
    windows = len(windows_NS)
    store = INT8 if options.weights == INT8 else None
    work = SweepWorkload(window=window, measured=(windows,), weights=store)
    plan, engine = _plan(model, work, device, caps, progress)
    require_room(plan.disk, {RUN: Path(tempfile.gettempdir())}, "the int8 working store")
    with open_layers(engine, store) as stream:
        measured = measure_perplexity(engine, stream, windows_NS, stride=stride)
    return {
        "model": model.name,
        "text": name,
        "window": window,
        "windows": windows,
        "stride": stride,
        **measured.describe(bytes_per_token(model, windows_NS, stride)),
        "runtime": STREAMED,
        "weights": options.weights,
        **describe_memory(plan, engine),
        "notes": [*plan.budget.notes, *model.notes],
    }


def _plan(
    model: Model, work: SweepWorkload, device: torch.device, caps: Caps, progress: Progress
) -> tuple[MemoryPlan, Engine]:
    """Plan the memory of the sweep and make an engine within its limits."""
    budget = make_budget(device, caps)
    progress.caps(budget.host_bytes, budget.gpu_bytes)
    base_bytes = measured_base_bytes(model.spec)
    plan = plan_memory(model.spec, budget, work, base_bytes=base_bytes)
    return plan, make_engine(model, plan, device, progress)
