"""``bench``: time a dense and a pruned model in alternating runs.

In: two models (folders, or GGUF files), a runtime. Out: tokens per second of prefill and decode,
peak memory and their ratios, as plain values. A separate process holds each model; the runs
alternate, so that a machine that slows down slows both. Holds no model itself.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from frugal_bonsai.errors import BenchError, OptionError
from frugal_bonsai.progress import Progress, Silent
from frugal_bonsai.run.open import open_model
from frugal_bonsai.version import package_version

TRANSFORMERS, LLAMA_CPP = "transformers", "llama.cpp"
RUNTIMES = (TRANSFORMERS, LLAMA_CPP)
GGUF_SUFFIX = ".gguf"
# Runs of each model that are not counted, because caches fill and threads start.
_WARM_UP = 1


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of ``bench``, except the two models.

    Attributes:
        runtime: ``transformers`` or ``llama.cpp``.
        prompt_tokens: Random tokens of the prompt.
        new_tokens: Tokens generated after it.
        repeat: Counted runs of each model.
        threads: Number of CPU threads. None takes the runtime's default.
        device: Device that computes (transformers). None takes a GPU if there is one.
        dtype: Dtype (transformers; a GGUF file has its own). None takes fp32 on a CPU, bf16 on a
            GPU.
        seed: Seed of the prompt.
    """

    runtime: str = TRANSFORMERS
    prompt_tokens: int = 256
    new_tokens: int = 64
    repeat: int = 5
    threads: int | None = None
    device: str | None = None
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise OptionError(f"--runtime: {self.runtime!r} is not one of {', '.join(RUNTIMES)}")
        for name in ("prompt_tokens", "new_tokens", "repeat"):
            if getattr(self, name) < 1:
                option = f"--{name.replace('_', '-')}"
                raise OptionError(f"{option}: {getattr(self, name)} is not at least 1")
        if self.runtime == LLAMA_CPP and (self.device or self.dtype):
            raise OptionError("--device and --dtype are for --runtime transformers")


def bench(
    dense: str,
    pruned: str,
    options: BenchOptions | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time two models in turn.

    Args:
        dense: The dense model: folder, hub id, ``example`` or GGUF file.
        pruned: The pruned model, likewise.
        options: All other options.
        progress: Told of each run.

    Returns:
        Plain values: for each model the median, smallest and largest rate of prefill and decode in
        tokens per second, and peak memory; and the ratios of the medians.

    Raises:
        OptionError: An option cannot work.
        BenchError: The process of a model ended.
    """
    options, progress = options or BenchOptions(), progress or Silent()
    models = {"dense": dense, "pruned": pruned}
    files = {name: _find(model, options.runtime) for name, model in models.items()}
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
            name: stack.enter_context(_Worker(name, file, prompt, options))
            for name, file in files.items()
        }
        facts = {name: worker.loaded() for name, worker in workers.items()}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
        for number in range(_WARM_UP + options.repeat):
            for name, worker in workers.items():
                done = worker.run()
                runs[name].append(done)
                progress.note(
                    f"run {number} of {options.repeat}, {name}: prefill "
                    f"{done['prefill_seconds']:.3f} s, decode {done['decode_seconds']:.3f} s"
                    + (", not counted" if number < _WARM_UP else "")
                )
    return facts, runs


def _find(model: str, runtime: str) -> str:
    """Return what the runtime loads: a folder or hub id, or a GGUF file."""
    path = Path(model)
    if runtime == TRANSFORMERS:
        if path.suffix == GGUF_SUFFIX:
            raise OptionError(f"{model}: a GGUF file needs --runtime llama.cpp")
        return model
    if path.is_file() and path.suffix == GGUF_SUFFIX:
        return str(path)
    found = sorted(path.glob(f"*{GGUF_SUFFIX}")) if path.is_dir() else []
    if len(found) != 1:
        raise OptionError(
            f"{model}: --runtime llama.cpp takes a GGUF file or a folder with one in it, found "
            f"{len(found)}; write one: frugal-bonsai export {model} --out {path.name}.gguf"
        )
    return str(found[0])


def _prompt(files: Sequence[str], options: BenchOptions) -> list[int]:
    """Draw random tokens that both models have."""
    if options.runtime == LLAMA_CPP:
        from frugal_bonsai.export.gguf_file import read_vocabulary

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


class _Worker:
    """The process of one model.

    Args:
        name: Name of the model, for error texts.
        model: Model as the runtime loads it.
        prompt: Token ids of the prompt.
        options: Options of the bench.
    """

    def __init__(self, name: str, model: str, prompt: list[int], options: BenchOptions) -> None:
        self._name, self._model = name, model
        self._asked = {"model": model, "prompt": prompt, "options": asdict(options)}
        # The output of libraries is not this command's; its end explains a failure.
        self._log = tempfile.TemporaryFile()
        environment = dict(os.environ)
        if options.threads is not None:
            environment["OMP_NUM_THREADS"] = str(options.threads)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "frugal_bonsai.run.bench_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env=environment,
        )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def loaded(self) -> dict[str, Any]:
        """Load the model and return its description."""
        return self._ask(json.dumps(self._asked))

    def run(self) -> dict[str, Any]:
        """Run once and return the seconds, and the peak memory so far."""
        return self._ask("run")

    def _ask(self, line: str) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        except OSError:
            pass  # the process has ended, and the answer is empty
        answer = process.stdout.readline()
        if not answer:
            raise BenchError(
                f"{self._name} model {self._model}: its process ended with code "
                f"{process.wait()}; is there enough memory? {self._last_words()}"
            )
        values: dict[str, Any] = json.loads(answer)
        if "error" in values:
            raise BenchError(f"{self._name} model: {values['error']} {self._last_words()}".rstrip())
        return values

    def _last_words(self) -> str:
        """Return the errors that llama.cpp logged, or the end of the log."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").splitlines()
        errors = [line for line in lines if " E " in line]
        return "\n".join(errors[:3] or lines[-3:])


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
