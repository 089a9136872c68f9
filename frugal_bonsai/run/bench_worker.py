"""The process in which ``bench`` times one model: ``python -m frugal_bonsai.run.bench_worker``.

In: one JSON object (:class:`WorkerOptions`) on the first line of standard input, then one line a
run. Out: one JSON object a line: what was loaded, then each run's seconds and the process's peak
memory; ``{"error": text}`` for a user's error. A process for each model, so that memory is its own.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from frugal_bonsai.errors import FrugalBonsaiError

TRANSFORMERS, LLAMA_CPP = "transformers", "llama.cpp"


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """What a worker times.

    Attributes:
        model: folder, hub id or ``example``; a GGUF file for llama.cpp.
        runtime: ``transformers`` or ``llama.cpp``.
        prompt: token ids.
        new_tokens: to make.
        threads: None leaves the runtime's choice.
        device: None takes a GPU where there is one; transformers.
        dtype: None is fp32 on a CPU, bf16 on a GPU; transformers.
    """

    model: str
    runtime: str
    prompt: list[int]
    new_tokens: int
    threads: int | None
    device: str | None
    dtype: str | None


def main() -> None:
    """Serve until standard input ends."""
    # Libraries may print: what was standard output is the channel, nothing else writes there.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    options = WorkerOptions(**json.loads(sys.stdin.readline()))
    try:
        _serve(options, channel)
    except FrugalBonsaiError as error:
        _say(channel, {"error": str(error)})


def _say(channel: TextIO, values: dict[str, Any]) -> None:
    channel.write(json.dumps(values) + "\n")
    channel.flush()


def _serve(options: WorkerOptions, channel: TextIO) -> None:
    from frugal_bonsai.memory.meter import peak_resident_bytes

    if options.runtime == LLAMA_CPP:
        from frugal_bonsai.evaluation.latency import LlamaCppModel

        timed: Any = LlamaCppModel(
            Path(options.model), len(options.prompt) + options.new_tokens + 8, options.threads
        )
        facts: dict[str, Any] = {"weight_bytes": Path(options.model).stat().st_size}
        gpu = None
    else:
        timed, facts, gpu = _load(options)
    _say(channel, facts)
    for _ in sys.stdin:
        latency = timed.run(options.prompt, options.new_tokens)
        peaks = {"host_peak_bytes": peak_resident_bytes(), "gpu_peak_bytes": _gpu_peak(gpu)}
        _say(channel, asdict(latency) | peaks)


def _load(options: WorkerOptions) -> tuple[Any, dict[str, Any], Any]:
    """The model in transformers, what it is, and its device."""
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
    with open_model(options.model) as opened:
        folder, spec = opened.folder, opened.spec
        weight_bytes = opened.checkpoint.weight_bytes
    model = load_pruned(folder, dtype=dtype).to(device)
    facts = {
        "weight_bytes": weight_bytes,
        "parameters": spec.parameters,
        "block_parameters": spec.block_parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    return TransformersModel(model), facts, device


def _gpu_peak(device: Any) -> int | None:
    from frugal_bonsai.memory.meter import peak_gpu_bytes

    return None if device is None else peak_gpu_bytes(device, 0)


if __name__ == "__main__":
    main()
