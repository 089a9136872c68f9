"""Seconds and residual of the last reconstruction, with and without what makes it fast.

    OMP_NUM_THREADS=1 python tools/bench_reconstruction.py MODEL --calibration TEXT --window 256 \
        --windows 128 --sparsity 0.2 [--eval-text TEXT] [--set '{"self_windows": 256}']

Prunes the model once for each variant, in turn, with the same masks (`local-only`):

    exact       fp32 products, the curvature of the channel updates on all tokens
    rounded     products over tokens round their factors, to bf16 on a CPU, to TF32 on CUDA
    sampled     the curvature on a part of the tokens
    now         both, and on a CPU micro-batches that stay in its cache: what `prune` does

The seconds are of the wall. Compare them within one run only, with nothing else running.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from frugal_bonsai.bonsai.reconstruction import layer_pass, reconstruct
from frugal_bonsai.bonsai.reconstruction.channels import update_channels
from frugal_bonsai.memory import work
from frugal_bonsai.progress import Silent
from frugal_bonsai.run.options import PruneOptions
from frugal_bonsai.run.prune import prune

_ALL = 2**40
# Variant -> (factors are rounded, curvature is sampled, micro-batches stay in the cache).
VARIANTS = {
    "exact": (False, False, False),
    "rounded": (True, False, False),
    "sampled": (False, True, False),
    "now": (True, True, True),
}


@contextmanager
def variant(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Run the block with a variant; ``seconds`` receives those of the last reconstruction."""
    rounded, sampled, cached = VARIANTS[name]
    run = reconstruct.Reconstruction.run

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        seconds.update(reconstruction=0.0, updates=0.0)
        started = time.perf_counter()
        result = run(self, *args, **kwargs)
        seconds["reconstruction"] = time.perf_counter() - started
        seconds["residual"] = sum(result.residual) / len(result.residual)
        return result

    def timed_update(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = update_channels(*args, **kwargs)
        seconds["updates"] += time.perf_counter() - started
        return result

    with ExitStack() as stack:
        stack.enter_context(patch.object(reconstruct.Reconstruction, "run", timed))
        stack.enter_context(patch.object(reconstruct, "update_channels", timed_update))
        if not rounded:
            stack.enter_context(patch.object(layer_pass, "fast_products", lambda _: nullcontext()))
        if not sampled:
            stack.enter_context(patch.object(work, "_CURVATURE_TOKENS", _ALL))
        if not cached:
            stack.enter_context(patch.object(layer_pass, "_CPU_TOKENS", _ALL))
        yield


def measure(given: argparse.Namespace, name: str) -> dict[str, Any]:
    """Prune once; return the seconds, the mean residual and the perplexity."""
    seconds: dict[str, float] = {}
    settings = {"sparsity": given.sparsity, "self_windows": 0, **json.loads(given.set)}
    options = PruneOptions(
        method="local-only",
        layout="per-layer",
        calibration=given.calibration,
        eval_text=given.eval_text,
        window=given.window,
        windows=given.windows,
        settings=settings,
    )
    with tempfile.TemporaryDirectory() as folder, variant(name, seconds):
        summary = prune(given.model, Path(folder) / "out", options, progress=Silent())
    return {**seconds, "perplexity": summary["after"]["eval_perplexity"]}


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval-text")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--set", default="{}", help="options of the prune as JSON")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    given = parser.parse_args()
    print("| variant | last reconstruction, s | of it channel updates, s | residual | perplexity |")
    print("|---|---|---|---|---|")
    for name in given.variants.split(","):
        found = measure(given, name)
        perplexity = "" if found["perplexity"] is None else f"{found['perplexity']:.3f}"
        print(
            f"| {name} | {found['reconstruction']:.1f} | {found['updates']:.1f} "
            f"| {found['residual']:.5f} | {perplexity} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
