"""The predicted time of a prune on several GPUs, for shapes of Llama from 8B to 405B.

    python tools/model_scaling.py [--profile h200] [--per-host 8] [-- --method paper]

Prints Markdown tables, by the time model of ``plan`` (docs/hardware.md): hours of masked
evaluation, of written text, of candidates and refits (``recovery``), of all, and how many times as
fast as one rank that is. What stands behind ``--`` are options of ``plan``. Nothing is run: the
shapes are configs without weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Name -> layers, hidden size, FFN channels, heads.
SHAPES = {
    "8B": (32, 4096, 14336, 32),
    "70B": (80, 8192, 28672, 64),
    "405B": (126, 16384, 53248, 128),
}
RANKS = (1, 8, 64, 1024)
_PHASES = ("masked evaluation", "writing text", "recovery")


def write_config(folder: Path, shape: tuple[int, int, int, int]) -> None:
    """Write the config of a Llama 3 of this shape."""
    layers, hidden, channels, heads = shape
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": channels,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def predict(folder: Path, ranks: int, per_host: int, words: list[str]) -> dict[str, Any]:
    """Return what ``plan --json`` prints for a launch of this many ranks."""
    here = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(min(ranks, per_host)), "RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "frugal_bonsai", "plan", str(folder), *words, "--json"],
        env={**os.environ, **here},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="h200")
    parser.add_argument("--per-host", type=int, default=8)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("options", nargs="*", help="options of plan, behind --")
    given = parser.parse_args()
    words = ["--profile", given.profile, *given.options]
    for name in given.shapes:
        print(f"\n| {name}: ranks | {' | '.join(f'{p}, h' for p in _PHASES)} | all, h | times |")
        print("|" + "---|" * (3 + len(_PHASES)))
        alone = 0.0
        for ranks in RANKS:
            with tempfile.TemporaryDirectory() as folder:
                write_config(Path(folder), SHAPES[name])
                values = predict(Path(folder), ranks, given.per_host, words)
            seconds = {phase["name"]: phase["seconds"] for phase in values["phases"]}
            alone = alone or values["seconds"]
            hours = [f"{seconds.get(phase, 0.0) / 3600:.2f}" for phase in _PHASES]
            total = f"{values['seconds'] / 3600:.2f}"
            times = f"{alone / values['seconds']:.1f}"
            print(f"| {ranks} | {' | '.join(hours)} | {total} | {times} |")


if __name__ == "__main__":
    main()
