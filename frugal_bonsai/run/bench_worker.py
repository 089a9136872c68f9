"""The process in which ``bench`` times one model: ``python -m frugal_bonsai.run.bench_worker``.

In: one JSON object (model, prompt, options of the bench) on the first line of standard input, then
one line per run. Out: one JSON object per line: the model's description, then the seconds and the
peak memory of each run; ``{"error": text}`` for a user's error. Each model has a process, so that
its memory is measured alone.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from frugal_bonsai.errors import FrugalBonsaiError
from frugal_bonsai.memory.meter import peak_gpu_bytes, peak_resident_bytes
from frugal_bonsai.run.bench import LLAMA_CPP, BenchOptions


def main() -> None:
    """Serve until standard input ends."""
    # Libraries may print, so they get standard error and the answers keep standard output.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asked = json.loads(sys.stdin.readline())
    try:
        _serve(asked["model"], asked["prompt"], BenchOptions(**asked["options"]), channel)
    except FrugalBonsaiError as error:
        _say(channel, {"error": str(error)})


def _say(channel: TextIO, values: dict[str, Any]) -> None:
    channel.write(json.dumps(values) + "\n")
    channel.flush()


def _serve(model: str, prompt: list[int], options: BenchOptions, channel: TextIO) -> None:
    if options.runtime == LLAMA_CPP:
        from frugal_bonsai.evaluation.latency import LlamaCppModel

        context = len(prompt) + options.new_tokens + 8
        timed: Any = LlamaCppModel(Path(model), context, options.threads)
        facts: dict[str, Any] = {"weight_bytes": Path(model).stat().st_size}
        gpu = None
    else:
        timed, facts, gpu = _load(model, options)
    _say(channel, facts)
    for _ in sys.stdin:
        latency = timed.run(prompt, options.new_tokens)
        peaks = {"host_peak_bytes": peak_resident_bytes(), "gpu_peak_bytes": _gpu_peak(gpu)}
        _say(channel, asdict(latency) | peaks)


def _load(model: str, options: BenchOptions) -> tuple[Any, dict[str, Any], Any]:
    """Return the model in transformers, its description and its device."""
    import torch

    from frugal_bonsai.evaluation.latency import TransformersModel
    from frugal_bonsai.memory.budget import find_device
    from frugal_bonsai.rewrite.load import load_pruned
    from frugal_bonsai.run.open import open_model
    from frugal_bonsai.stream.engine import compute_dtype

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = find_device(options.device)
    dtype = compute_dtype(device) if options.dtype is None else getattr(torch, options.dtype)
    with open_model(model) as opened:
        folder, spec = opened.folder, opened.spec
        weight_bytes = opened.checkpoint.weight_bytes
    loaded = load_pruned(folder, dtype=dtype).to(device)
    facts = {
        "weight_bytes": weight_bytes,
        "parameters": spec.parameters,
        "block_parameters": spec.block_parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    return TransformersModel(loaded), facts, device


def _gpu_peak(device: Any) -> int | None:
    return None if device is None else peak_gpu_bytes(device, 0)


if __name__ == "__main__":
    main()
