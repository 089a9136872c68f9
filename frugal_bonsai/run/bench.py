"""``bench``: time a dense and a pruned model in alternating runs.

In: two models (folders, or GGUF files), a runtime. Out: tokens per second of prefill and decode,
peak memory and their ratios, as plain values. A separate process holds each model; the runs
alternate, so that a machine that slows down slows both. Holds no model itself.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.gguf_header import read_vocabulary
from frugal_bonsai.errors import OptionError
from frugal_bonsai.evaluation.llama_cpp import LLAMA_CPP
from frugal_bonsai.progress import Progress
from frugal_bonsai.report.bar import choose_progress
from frugal_bonsai.run.child import Child
from frugal_bonsai.run.early import check_bench
from frugal_bonsai.run.evaluate_gguf import find_gguf
from frugal_bonsai.run.keywords import one_of
from frugal_bonsai.run.open import open_model
from frugal_bonsai.run.options import BenchOptions
from frugal_bonsai.version import package_version

# Runs of each model that are not counted, because caches fill and threads start.
_WARM_UP = 1
_WORKER = "frugal_bonsai.run.bench_worker"


def bench(
    dense: str,
    pruned: str,
    options: BenchOptions | None = None,
    *,
    progress: Progress | bool | None = None,
    **named: Any,
) -> dict[str, Any]:
    """Time two models in turn.

    Args:
        dense: The dense model: folder, hub id, ``example`` or GGUF file.
        pruned: The pruned model, likewise.
        options: All other options as one object, instead of keywords.
        progress: Told of each run. None shows a bar in notebooks, False nothing.
        named: All other options by name: those of ``frugal-bonsai bench``, with underscores.

    Returns:
        Plain values: for each model the median, smallest and largest rate of prefill and decode in
        tokens per second, and peak memory; and the ratios of the medians.

    Raises:
        OptionError: An option cannot work.
        BenchError: The process of a model ended.
    """
    options, progress = one_of(BenchOptions, named, options), choose_progress(progress)
    check_bench(dense, pruned, options)
    models = {"dense": dense, "pruned": pruned}
    files = models
    if options.runtime == LLAMA_CPP:
        files = {name: str(find_gguf(model)) for name, model in models.items()}
    prompt = _prompt(list(files.values()), options)
    facts, runs = _measure(files, prompt, options, progress)
    results = {
        name: {"model": models[name], **facts[name], **_figures(runs[name][_WARM_UP:], options)}
        for name in models
    }
    return {
        "version": package_version(),
        **asdict(options),
        **results,
        "ratios": _ratios(results["dense"], results["pruned"]),
    }


def _measure(
    files: dict[str, str], prompt: list[int], options: BenchOptions, progress: Progress
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Load the models, run them in turn, and return their descriptions and runs."""
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Child(_WORKER, f"{name} model {file}", options.threads))
            for name, file in files.items()
        }
        facts = {
            name: worker.ask({"model": files[name], "prompt": prompt, "options": asdict(options)})
            for name, worker in workers.items()
        }
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
        for number in range(_WARM_UP + options.repeat):
            for name, worker in workers.items():
                done = worker.ask({})
                runs[name].append(done)
                progress.note(
                    f"run {number} of {options.repeat}, {name}: prefill "
                    f"{done['prefill_seconds']:.3f} s, decode {done['decode_seconds']:.3f} s"
                    + (", not counted" if number < _WARM_UP else "")
                )
    return facts, runs


def _prompt(files: Sequence[str], options: BenchOptions) -> list[int]:
    """Draw random tokens that both models have."""
    if options.runtime == LLAMA_CPP:
        vocabulary = min(read_vocabulary(Path(file)) for file in files)
    else:
        vocabulary = 2**62
        for file in files:
            with open_model(file, headers_only=True) as opened:
                spec = opened.spec
            vocabulary = min(vocabulary, spec.vocabulary)
            if options.prompt_tokens + options.new_tokens > spec.positions:
                raise OptionError(
                    f"--prompt-tokens, --new-tokens: {options.prompt_tokens} and "
                    f"{options.new_tokens} are more than the {spec.positions} positions of {file}"
                )
    draw = random.Random(options.seed)
    return [draw.randrange(vocabulary) for _ in range(options.prompt_tokens)]


def _figures(runs: Sequence[dict[str, Any]], options: BenchOptions) -> dict[str, Any]:
    """Return medians and spread of one model's runs."""
    rates = {
        "prefill": [options.prompt_tokens / run["prefill_seconds"] for run in runs],
        "decode": [options.new_tokens / run["decode_seconds"] for run in runs],
    }
    figures: dict[str, Any] = {
        f"{kind}_tokens_per_second": {
            "median": statistics.median(values),
            "smallest": min(values),
            "largest": max(values),
            "runs": values,
        }
        for kind, values in rates.items()
    }
    peaks = ("host_peak_bytes", "gpu_peak_bytes")
    return figures | {peak: runs[-1][peak] for peak in peaks}


def _ratios(dense: dict[str, Any], pruned: dict[str, Any]) -> dict[str, float | None]:
    """Return pruned / dense: rates above 1 are faster, memory below 1 is smaller."""
    ratios: dict[str, float | None] = {
        kind: pruned[f"{kind}_tokens_per_second"]["median"]
        / dense[f"{kind}_tokens_per_second"]["median"]
        for kind in ("prefill", "decode")
    }
    for peak in ("host_peak_bytes", "gpu_peak_bytes"):
        ratios[peak] = pruned[peak] / dense[peak] if dense[peak] else None
    return ratios
