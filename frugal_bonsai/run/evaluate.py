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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.evaluation.harness import load_tasks, split_names
from frugal_bonsai.evaluation.llama_cpp import LLAMA_CPP
from frugal_bonsai.evaluation.perplexity import measure_perplexity
from frugal_bonsai.memory.budget import Caps, find_device, make_budget, parse_caps
from frugal_bonsai.memory.disk import RUN
from frugal_bonsai.memory.plan import MemoryPlan, SweepWorkload, plan_memory
from frugal_bonsai.model.tied_head import require_tied_head
from frugal_bonsai.progress import Progress, Silent
from frugal_bonsai.run.disk_room import require_room
from frugal_bonsai.run.early import check_eval
from frugal_bonsai.run.engine import make_engine, measured_base_bytes
from frugal_bonsai.run.evaluate_gguf import evaluate_gguf
from frugal_bonsai.run.evaluate_tasks import evaluate_tasks
from frugal_bonsai.run.open import Model, note_model, open_model
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
    text: str | None = None,
    *,
    tasks: str | Sequence[str] = (),
    task_data: Sequence[str] = (),
    limit: int | None = None,
    window: int | None = None,
    windows: int | None = None,
    stride: int | None = None,
    weights: str = "native",
    runtime: str = STREAMED,
    max_gpu_mem: str | int | None = None,
    max_cpu_mem: str | int | None = None,
    device: str | None = None,
    assume_family: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the perplexity of a model on a text, its scores on tasks, or both.

    Args:
        model: Folder, GGUF file, hub id or ``example``; dense or pruned, any layout.
        text: File, JSON lines, hub data set or ``stdlib``. None measures no perplexity.
        tasks: Tasks of lm-evaluation-harness, as a list or separated by commas.
        task_data: Local items of tasks: folders, or ``TASK=FILE``. None are read from the hub.
        limit: Number of items of each task. None takes all.
        window: Tokens of a window. None takes 2,048 or the model's positions. Requests of tasks
            are truncated to it; None truncates them to the model's positions.
        windows: Largest number of windows. None takes the whole text.
        stride: Tokens between the starts of two windows of the text, less than ``window``; each
            token counts once. None is ``window``: without overlap.
        weights: ``native`` streams the checkpoint itself, ``int8`` a quantised working copy.
        runtime: ``streamed``, or ``llama.cpp`` for a GGUF file, which takes no caps.
        max_gpu_mem: Cap on device memory: bytes, or text such as ``"24GB"``.
        max_cpu_mem: Cap on resident memory, likewise.
        device: Device that computes. None takes a GPU if there is one.
        assume_family: Family whose table is used for an architecture that has none.
        progress: Told of each layer visit.

    Returns:
        Plain values (what ``eval --json`` prints).

    Raises:
        FrugalBonsaiError: The user can mend it.
    """
    started, progress = time.monotonic(), progress or Silent()
    names = split_names(tasks)
    files = check_eval(
        model,
        text,
        tasks=names,
        task_data=task_data,
        limit=limit,
        window=window,
        stride=stride,
        weights=weights,
        runtime=runtime,
        max_gpu_mem=max_gpu_mem,
        max_cpu_mem=max_cpu_mem,
        device=device,
        assume_family=assume_family,
    )
    if runtime == LLAMA_CPP:
        assert text is not None  # checked above
        return evaluate_gguf(
            model, text, window=window, windows=windows, stride=stride, progress=progress
        )
    caps = parse_caps(max_gpu_mem, max_cpu_mem)
    loaded = load_tasks(names, files) if names else None
    values: dict[str, Any] = {"model": model, "runtime": STREAMED, "weights": weights}
    place: dict[str, Any] = {"device": find_device(device), "caps": caps, "progress": progress}
    with open_model(model, assume_family=assume_family) as opened:
        note_model(opened, progress)
        require_tied_head(opened.checkpoint, opened.spec)
        if text is not None:
            cut = {"window": window, "windows": windows, "stride": stride}
            values |= _measure(opened, text, cut, weights=weights, **place)
        if loaded is not None:
            store = INT8 if weights == INT8 else None
            scored, _ = evaluate_tasks(
                opened, loaded, limit=limit, window=window, weights=store, **place
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
    cut: Mapping[str, int | None],
    *,
    weights: str,
    device: torch.device,
    caps: Caps,
    progress: Progress,
) -> dict[str, Any]:
    """Measure the perplexity within a memory plan; return both as plain values.

    Args:
        model: The model.
        text: Source of the text.
        cut: ``window``, ``windows`` and ``stride`` as the user names them.
        weights: ``"int8"`` for a working copy. ``"native"`` streams the checkpoint.
        device: Device that computes.
        caps: Caps of the user.
        progress: Told of each layer visit.
    """
    window, stride = choose_window(model.spec, cut["window"]), cut["stride"]
    require_stride(stride, window)
    name, windows_NS = read_windows(
        model, text, window, windows=cut["windows"], option="--text", stride=stride
    )
    windows = len(windows_NS)
    store = INT8 if weights == INT8 else None
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
        "weights": weights,
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
