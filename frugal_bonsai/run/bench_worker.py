"""The process in which ``bench`` times one model: ``python -m frugal_bonsai.run.bench_worker``.

In: one JSON object (model, prompt, options of the bench) on the first line of standard input, then
one line per run. Out: one JSON object per line: the model's description, then the seconds and the
peak memory of each run. Each model has a process, so that its memory is measured alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.commit import require_free_space
from frugal_bonsai.checkpoint.gguf_reader import GgufCheckpoint
from frugal_bonsai.evaluation.llama_cpp import LLAMA_CPP
from frugal_bonsai.memory.meter import peak_gpu_bytes, peak_resident_bytes
from frugal_bonsai.run.child import serve
from frugal_bonsai.run.open import Model, open_model
from frugal_bonsai.run.options import BenchOptions


class _Bench:
    """Load the model of the first question, and run it at every other."""

    def __init__(self) -> None:
        self._timed: Any = None
        self._prompt: list[int] = []
        self._new_tokens, self._gpu = 0, None

    def __call__(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return the model's description, or seconds and peak memory of a run."""
        if self._timed is None:
            options = BenchOptions(**asked["options"])
            self._prompt, self._new_tokens = asked["prompt"], options.new_tokens
            self._timed, facts, self._gpu = _load(asked["model"], len(self._prompt), options)
            return facts
        latency = self._timed.run(self._prompt, self._new_tokens)
        gpu_peak = None if self._gpu is None else peak_gpu_bytes(self._gpu, 0)
        peaks = {"host_peak_bytes": peak_resident_bytes(), "gpu_peak_bytes": gpu_peak}
        return asdict(latency) | peaks


def _load(model: str, prompt_tokens: int, options: BenchOptions) -> tuple[Any, dict[str, Any], Any]:
    """Return the model in its runtime, its description and its device."""
    if options.runtime != LLAMA_CPP:
        return _load_transformers(model, options)
    from frugal_bonsai.evaluation.latency import LlamaCppModel

    context = prompt_tokens + options.new_tokens + 8
    timed = LlamaCppModel(Path(model), context, options.threads)
    return timed, {"weight_bytes": Path(model).stat().st_size}, None


def _load_transformers(model: str, options: BenchOptions) -> tuple[Any, dict[str, Any], Any]:
    """Return the model in transformers, its description and its device."""
    import torch

    from frugal_bonsai.evaluation.latency import TransformersModel
    from frugal_bonsai.memory.budget import find_device
    from frugal_bonsai.rewrite.load import load_pruned
    from frugal_bonsai.stream.engine import compute_dtype

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = find_device(options.device)
    dtype = compute_dtype(device) if options.dtype is None else getattr(torch, options.dtype)
    with open_model(model, text_only=False) as opened, _plain_folder(opened) as folder:
        spec, weight_bytes = opened.spec, opened.checkpoint.weight_bytes
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


@contextmanager
def _plain_folder(model: Model) -> Iterator[Path]:
    """Yield the model's folder; for a GGUF file, a temporary one with its weights dequantised."""
    if not isinstance(model.checkpoint, GgufCheckpoint):
        yield model.folder
        return
    from frugal_bonsai.rewrite.dense import write_dense

    with tempfile.TemporaryDirectory(prefix="frugal-bonsai-bench-") as folder:
        what = "the dequantised model of the bench"
        require_free_space(Path(folder), model.checkpoint.weight_bytes, what)
        write_dense(model.checkpoint, Path(folder))
        yield Path(folder)


if __name__ == "__main__":
    serve(_Bench())
