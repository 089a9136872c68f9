"""Valid files of every kind that the program reads, made once: tiny models, outputs, runs.

In: a folder. Out: the paths of what was written there. The models are those of the tests.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from frugal_bonsai.progress import Silent

ROOT = Path(__file__).resolve().parents[2]
# Families whose configs and tensors differ most.
FAMILIES = (
    *("llama", "qwen2", "qwen3_5", "gemma3", "phi3", "gpt2", "falcon-groups", "mixtral", "gpt-oss"),
    *("deepseek-v3", "granite4-experts", "opt", "qwen3-next", "lfm2", "olmoe", "stablelm"),
)
GGUF_FAMILIES = ("llama", "gpt2", "mixtral", "gemma3")
# Cap of the samples' runs, above what a process holds that has run thousands of tests.
MOST_MEMORY = "12GB"
QUICK: dict[str, Any] = {
    **{"calibration": "stdlib", "windows": 8, "window": 32, "max_cpu_mem": MOST_MEMORY},
    **{"device": "cpu", "sparsity": 0.4, "step": 0.2, "masks": 4, "mask_windows": 4},
    **{"layout": "per-layer", "report": False},
}


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Where the valid files are.

    Attributes:
        folder: Holds all of them.
        models: Folders of models with a tokenizer.
        gguf: GGUF files.
        pruned: Output of a prune.
        adapted: Output of an adaptation.
        run: Run directory of a prune that was stopped in its second round.
        training: Run directory of an adaptation that was stopped.
        cache: Folder of a teacher's cache.
    """

    folder: Path
    models: tuple[Path, ...]
    gguf: tuple[Path, ...]
    pruned: Path
    adapted: Path
    run: Path
    training: Path
    cache: Path


class StopAt(Silent):
    """Progress that stops a run at a sweep, in a round or behind it."""

    def __init__(self, sweep: str, *, number: int = 0, calls: int = 1) -> None:
        self._sweep, self._number, self._calls = sweep, number, calls

    def round(self, number: int, rounds: int, sparsity: float) -> None:
        """Count the rounds."""
        self._number -= 1

    def sweep(self, name: str, steps: int, tokens_per_step: int) -> None:
        """Stop at the sweep."""
        if self._number <= 0 and self._sweep in name:
            self._calls -= 1
            if self._calls == 0:
                raise KeyboardInterrupt


def make_models(folder: Path, families: tuple[str, ...] = FAMILIES) -> tuple[Path, ...]:
    """Write tiny models with a tokenizer of 512 tokens."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))
    tiny = import_module("tiny_models")
    known = [name for name in families if name in tiny.FAMILY_CONFIGS]
    for name in known:
        model_type, config = tiny.FAMILY_CONFIGS[name]
        tiny.save_tiny(folder / name, model_type, **{**config, "vocab_size": 512})
        tiny.save_pair_tokenizer(folder / name)
    return tuple(folder / name for name in known)


def make_gguf(folder: Path, models: tuple[Path, ...]) -> tuple[Path, ...]:
    """Export the models that llama.cpp has."""
    from frugal_bonsai.run.export import export_gguf

    made = []
    for model in models:
        if model.name in GGUF_FAMILIES:
            made.append(folder / f"{model.name}.gguf")
            export_gguf(str(model), made[-1], dtype="f32" if len(made) % 2 else "q8_0")
    return tuple(made)


def make_samples(folder: Path, families: tuple[str, ...] = FAMILIES) -> Samples:
    """Write everything; takes some ten seconds."""
    from frugal_bonsai.run.adapt import adapt
    from frugal_bonsai.run.options import AdaptOptions
    from frugal_bonsai.run.prune import prune

    # The rates of this machine are measured once for all cases.
    machine: Any = import_module("frugal_bonsai.run.machine")
    machine.quick_profile = cache(machine.quick_profile)
    models = make_models(folder / "models", families)
    teacher, pruned, adapted = str(models[0]), folder / "pruned", folder / "adapted"
    prune(teacher, pruned, progress=False, **QUICK)
    with suppress(KeyboardInterrupt):
        prune(teacher, folder / "stopped", progress=StopAt("trial", number=2), **QUICK)
    chosen = AdaptOptions(
        teacher=teacher,
        data=("stdlib",),
        settings={"tokens": 1024},
        teacher_cache=folder / "caches",
        windows=16,
        window=32,
        max_cpu_mem=MOST_MEMORY,
        device="cpu",
        report=False,
    )
    adapt(str(pruned), adapted, chosen, progress=False)
    with suppress(KeyboardInterrupt):
        adapt(str(pruned), folder / "training", chosen, progress=StopAt("perplexity", calls=2))
    return Samples(
        folder=folder,
        models=models,
        gguf=make_gguf(folder, models),
        pruned=pruned,
        adapted=adapted,
        run=folder / "stopped.run",
        training=folder / "training.run",
        cache=next((folder / "caches").iterdir()),
    )
