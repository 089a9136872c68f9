"""Compare methods over sparsities and seeds: a Markdown table, and a plot if matplotlib is there.

    python tools/compare_methods.py MODEL --calibration TEXT --eval-text TEXT --window 256 \
        --windows 128 --methods default,local-only,paper --sparsities 0.2,0.5 --seeds 0,1,2 \
        --out results.md --plot results.png

Every row has the same units, layout, calibration windows and evaluation; only the method differs.
A run that is finished is kept in OUT.json and not run again. The plot alone needs matplotlib: `pip
install frugal-bonsai[compare]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from frugal_bonsai.bonsai.settings import METHODS
from frugal_bonsai.progress import Silent
from frugal_bonsai.run.options import PruneOptions
from frugal_bonsai.run.prune import prune


def run_one(options: argparse.Namespace, method: str, sparsity: float, seed: int) -> dict[str, Any]:
    """One prune; its figures."""
    settings = {**json.loads(options.set), "sparsity": sparsity, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        summary = prune(
            options.model,
            Path(folder) / "out",
            PruneOptions(
                method=method,
                settings=settings,
                layout=options.layout,
                calibration=options.calibration,
                eval_text=options.eval_text,
                window=options.window,
                windows=options.windows,
            ),
            progress=Silent(),
        )
    return {
        "method": method,
        "target": sparsity,
        "seed": seed,
        "sparsity": summary["sparsity"],
        "perplexity": summary["after"]["eval_perplexity"],
        "tokens": summary["forward_tokens"],
        "seconds": summary["seconds"],
        "dense": summary["before"]["eval_perplexity"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one row a method and sparsity, means and spreads over the seeds."""
    lines = [
        "| method | removed | perplexity | spread of the seeds | seeds | tokens | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for (method, _), group in _grouped(rows):
        values = [row["perplexity"] for row in group]
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        lines.append(
            f"| {method} | {statistics.mean(r['sparsity'] for r in group):.2%} "
            f"| {statistics.mean(values):.2f} | {spread} | {len(values)} "
            f"| {statistics.mean(r['tokens'] for r in group) / 1e6:.2f} M "
            f"| {statistics.mean(r['seconds'] for r in group):.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against sparsity, and against tokens spent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [group for (name, _), group in _grouped(rows) if name == method]
        perplexity = [statistics.mean(r["perplexity"] for r in group) for group in mine]
        sparsity = [statistics.mean(r["sparsity"] for r in group) for group in mine]
        tokens = [statistics.mean(r["tokens"] for r in group) for group in mine]
        left.plot(sparsity, perplexity, marker="o", label=method)
        right.scatter(tokens, perplexity, label=method)
    left.set(xlabel="share of the block weights removed", ylabel="perplexity", yscale="log")
    right.set(xlabel="forward tokens spent", xscale="symlog")
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _grouped(
    rows: list[dict[str, Any]],
) -> Iterable[tuple[tuple[str, float], list[dict[str, Any]]]]:
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["target"]), []).append(row)
    return groups.items()


def _key(row: dict[str, Any]) -> tuple[str, float, int]:
    return row["method"], row["target"], row["seed"]


def main(arguments: list[str] | None = None) -> None:
    """Run what is not in OUT.json yet, then write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--methods", default="default,local-only", help=", ".join(METHODS))
    parser.add_argument("--sparsities", default="0.2,0.5")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--layout", default="per-layer", choices=["uniform", "per-layer"])
    parser.add_argument("--calibration")
    parser.add_argument("--eval-text", required=True)
    parser.add_argument("--window", type=int)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--set", default="{}", help="JSON: settings over those of every method")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    methods = options.methods.split(",")
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        parser.error(f"--methods: {', '.join(unknown)} unknown; known: {', '.join(METHODS)}")
    kept = options.out.with_suffix(".json")
    rows: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    for sparsity in map(float, options.sparsities.split(",")):
        for method in methods:
            for seed in map(int, options.seeds.split(",")):
                if (method, sparsity, seed) in map(_key, rows):
                    continue
                rows.append(run_one(options, method, sparsity, seed))
                kept.write_text(json.dumps(rows, indent=1) + "\n")
                print(rows[-1], flush=True)
    options.out.write_text(table(rows))
    if options.plot is not None:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
