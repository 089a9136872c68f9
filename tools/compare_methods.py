"""Compare methods over sparsities, seeds and models: Markdown tables, and plots with matplotlib.

    python tools/compare_methods.py MODEL [MODEL ...] --calibration TEXT --eval-text TEXT \
        --window 256 --windows 224 --methods default,local-only,paper --sparsities 0.2,0.5 \
        --seeds 0,1,2 --out results.md --plot results.png

Every row has the same units, layout, calibration text, verification and evaluation; only the method
differs. Finished runs are kept in OUT.json and not run again. So a comparison can be stopped and
extended: other values of `--set` and `--windows` add rows (a method under a smaller token budget,
say). Only the plot needs matplotlib: `pip install -e '.[plots]'`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from frugal_bonsai.bonsai.methods import METHODS
from frugal_bonsai.model.layout import LAYOUTS, PER_LAYER
from frugal_bonsai.progress import Silent
from frugal_bonsai.run.options import PruneOptions
from frugal_bonsai.run.prune import prune

Row = dict[str, Any]
# What tells two runs apart.
_KEY = ("model", "method", "options", "layout", "windows", "target", "seed")


def run_one(given: argparse.Namespace, key: Row) -> Row:
    """One prune; its key and figures."""
    settings = {**json.loads(given.set), "sparsity": key["target"], "seed": key["seed"]}
    with tempfile.TemporaryDirectory() as folder:
        summary = prune(
            key["model"],
            Path(folder) / "out",
            PruneOptions(
                method=key["method"],
                settings=settings,
                layout=given.layout,
                calibration=given.calibration,
                eval_text=given.eval_text,
                window=given.window,
                windows=given.windows,
            ),
            progress=Silent(),
        )
    # Without a text of one's own: the calibration windows that the search did not see.
    measure = "perplexity" if given.eval_text is None else "eval_perplexity"
    return key | {
        "sparsity": summary["sparsity"],
        "perplexity": summary["after"][measure],
        "dense": summary["before"][measure],
        "tokens": summary["forward_tokens"],
        "seconds": summary["seconds"],
        "attention_units_gone": sum(summary["dense"]["attention"])
        - sum(summary["kept"]["attention"]),
    }


def keys(given: argparse.Namespace) -> Iterable[Row]:
    """List the runs in order."""
    options = ", ".join(f"{name} {value}" for name, value in json.loads(given.set).items())
    for model in given.models:
        for target in map(float, given.sparsities.split(",")):
            for method in given.methods.split(","):
                for seed in map(int, given.seeds.split(",")):
                    values = (model, method, options, given.layout, given.windows, target, seed)
                    yield dict(zip(_KEY, values, strict=True))


def tables(rows: list[Row]) -> str:
    """Markdown: a table a model, one row a method and sparsity, means and spreads of the seeds."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        dense = statistics.mean(row["dense"] for row in mine)
        parts.append(f"## {Path(model).name}, dense {dense:.2f}\n\n{_table(mine)}")
    return "\n".join(parts)


def _table(rows: list[Row]) -> str:
    lines = [
        "| method | windows | removed | perplexity | spread | seeds | attention units gone "
        "| tokens | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for group in _grouped(sorted(rows, key=lambda row: float(row["target"]))):
        first, values = group[0], [row["perplexity"] for row in group]
        spread = f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else ""
        gone = dict.fromkeys(str(row["attention_units_gone"]) for row in group)
        cells = (
            name(first),
            str(first["windows"] or ""),
            f"{statistics.mean(row['sparsity'] for row in group):.2%}",
            f"{statistics.mean(values):.2f}",
            spread,
            ", ".join(str(row["seed"]) for row in group),
            ", ".join(gone),
            f"{statistics.mean(row['tokens'] for row in group) / 1e6:.2f} M",
            f"{statistics.mean(row['seconds'] for row in group):.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def name(row: Row) -> str:
    """A method, and what was set beside it."""
    return f"{row['method']} ({row['options']})" if row["options"] else str(row["method"])


def plot(rows: list[Row], path: Path) -> None:
    """Perplexity against sparsity, and against tokens spent; one line of panels a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in rows))
    labels = list(dict.fromkeys(map(name, rows)))
    colours = {label: pyplot.get_cmap("tab20")(at) for at, label in enumerate(labels)}
    size = (10, 3.8 * len(models))
    figure, axes = pyplot.subplots(len(models), 2, figsize=size, squeeze=False)
    for (left, right), model in zip(axes, models, strict=True):
        mine = [row for row in rows if row["model"] == model]
        for label in labels:
            groups = [g for g in _grouped(mine) if name(g[0]) == label]
            groups.sort(key=lambda group: float(group[0]["target"]))
            means = [
                tuple(statistics.mean(row[x] for row in group) for x in _AXES) for group in groups
            ]
            if means:
                sparsity, tokens, perplexity = zip(*means, strict=True)
                left.plot(sparsity, perplexity, marker="o", color=colours[label], label=label)
                right.plot(tokens, perplexity, "o", color=colours[label])
        dense = statistics.mean(row["dense"] for row in mine)
        for panel in (left, right):
            panel.axhline(dense, color="grey", linewidth=0.8, linestyle=":")
            panel.set(yscale="log", ylabel="perplexity")
        left.set(xlabel="share of the block weights removed", title=Path(model).name)
        right.set(xlabel="forward tokens spent", xscale="log", title=f"dense {dense:.2f}")
        left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


_AXES = ("sparsity", "tokens", "perplexity")


def _grouped(rows: list[Row]) -> list[list[Row]]:
    """Runs that differ in the seed alone."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in _KEY if key != "seed"), []).append(row)
    return list(groups.values())


def read_rows(path: Path) -> list[Row]:
    """Rows of an earlier run; none where there is no file."""
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Run the rows that OUT.json lacks, then write the tables and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--methods", default="default,local-only", help=", ".join(METHODS))
    parser.add_argument("--sparsities", default="0.2,0.5")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--layout", default=PER_LAYER, choices=LAYOUTS)
    parser.add_argument("--calibration")
    parser.add_argument("--eval-text", help="default: calibration windows held out")
    parser.add_argument("--window", type=int)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--set", default="{}", help="JSON: settings over those of every method")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args(arguments)
    unknown = [name for name in given.methods.split(",") if name not in METHODS]
    if unknown:
        parser.error(f"--methods: {', '.join(unknown)} unknown; known: {', '.join(METHODS)}")
    kept = given.out.with_suffix(".json")
    rows = read_rows(kept)
    for key in keys(given):
        if key in [{part: row[part] for part in _KEY} for row in rows]:
            continue
        rows.append(run_one(given, key))
        kept.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(rows[-1], flush=True)
    given.out.write_text(tables(rows), encoding="utf-8")
    if given.plot is not None:
        plot(rows, given.plot)


if __name__ == "__main__":
    main()
