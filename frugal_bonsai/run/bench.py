"""``bench``: how much faster the pruned model is than the dense one, measured in one run.

In: two models (folders, or GGUF files), a runtime. Out: tokens per second of reading a prompt and
of making tokens, peak memory, their ratios, as plain values. Each model is held by a process of its
own; their runs alternate, so that a machine that slows down slows both. Holds nothing itself.
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
from frugal_bonsai.run.bench_worker import LLAMA_CPP, TRANSFORMERS, WorkerOptions
from frugal_bonsai.version import package_version

RUNTIMES = (TRANSFORMERS, LLAMA_CPP)
GGUF_SUFFIX = ".gguf"
# Runs of each model that are not counted: caches fill, threads start.
_WARM_UP = 1


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured.

    Attributes:
        runtime: ``transformers`` or ``llama.cpp``.
        prompt_tokens: of the prompt, random ones.
        new_tokens: made after it.
        repeat: counted runs of each model.
        threads: None leaves the runtime's choice.
        device: None takes a GPU where there is one (transformers).
        dtype: None is fp32 on a CPU, bf16 on a GPU (transformers; a GGUF file has its own).
        seed: of the prompt.
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
        dense: the model that is compared with.
        pruned: the other one.
        options: what is measured.
        progress: told of each run.

    Returns:
        Plain values: for each model medians, smallest and largest of prefill and decode in tokens
        per second, peak memory; and the ratios of the medians.

    Raises:
        OptionError: an option that cannot work.
        BenchError: a model's process ended.
    """
    options, progress = options or BenchOptions(), progress or Silent()
    models = {"dense": dense, "pruned": pruned}
    files = {name: _find(model, options.runtime) for name, model in models.items()}
    prompt = _prompt(list(files.values()), options)
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(_Worker(name, _worker_options(file, prompt, options)))
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


def _find(model: str, runtime: str) -> str:
    """What the runtime loads: a folder or hub id, or a GGUF file."""
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
    """Random tokens that both models have."""
    if options.runtime == LLAMA_CPP:
        from frugal_bonsai.export.gguf_file import read_vocabulary

        vocabulary = min(read_vocabulary(Path(file)) for file in files)
    else:
        from frugal_bonsai.run.open import open_model

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


def _worker_options(file: str, prompt: list[int], options: BenchOptions) -> WorkerOptions:
    return WorkerOptions(
        model=file,
        runtime=options.runtime,
        prompt=prompt,
        new_tokens=options.new_tokens,
        threads=options.threads,
        device=options.device,
        dtype=options.dtype,
    )


class _Worker:
    """One model's process.

    Args:
        name: of the model, for error texts.
        options: what it is asked.
    """

    def __init__(self, name: str, options: WorkerOptions) -> None:
        self._name, self._options = name, options
        # What libraries say is not this command's output; the end of it explains a failure.
        self._said = tempfile.TemporaryFile()
        environment = dict(os.environ)
        if options.threads is not None:
            environment["OMP_NUM_THREADS"] = str(options.threads)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "frugal_bonsai.run.bench_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
            env=environment,
        )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def loaded(self) -> dict[str, Any]:
        """Have it load the model; what it says of it."""
        return self._ask(json.dumps(asdict(self._options)))

    def run(self) -> dict[str, Any]:
        """One run's seconds and the peak memory so far."""
        return self._ask("run")

    def _ask(self, line: str) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        except OSError:
            pass  # it has ended: the empty answer says so
        answer = process.stdout.readline()
        if not answer:
            raise BenchError(
                f"{self._name} model {self._options.model}: its process ended with code "
                f"{process.wait()}; is there enough memory? {self._last_words()}"
            )
        values: dict[str, Any] = json.loads(answer)
        if "error" in values:
            raise BenchError(f"{self._name} model: {values['error']} {self._last_words()}".rstrip())
        return values

    def _last_words(self) -> str:
        """The errors that llama.cpp logged, or the end of what was said."""
        self._said.seek(0)
        lines = self._said.read().decode("utf-8", "replace").splitlines()
        errors = [line for line in lines if " E " in line]
        return "\n".join(errors[:3] or lines[-3:])


def _figures(runs: Sequence[dict[str, Any]], options: BenchOptions) -> dict[str, Any]:
    """Medians and spread of one model's runs."""
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
    """Pruned against dense: above 1 is faster, or smaller for memory below 1."""
    ratios: dict[str, float | None] = {
        kind: pruned[f"{kind}_tokens_per_second"]["median"]
        / dense[f"{kind}_tokens_per_second"]["median"]
        for kind in ("prefill", "decode")
    }
    for peak in ("host_peak_bytes", "gpu_peak_bytes"):
        ratios[peak] = pruned[peak] / dense[peak] if dense[peak] else None
    return ratios
