"""Efficiency of masked evaluation and of a whole prune on several ranks, against one.

    python tools/bench_scaling.py MODEL [--ranks 2] [--repeat 3] -- --sparsity 0.5

Prunes with one process and with several, in turn, one thread each, and prints the seconds of both
and the efficiency: seconds of one rank / (ranks x seconds of several). What stands behind ``--``
are options of ``prune``. The seconds are of the wall: compare them within one run only, on cores
that nothing else uses. The weights of all prunes are compared, too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_MASKED = "masked evaluation"


def masked_seconds(events: list[dict[str, Any]]) -> float:
    """Return the seconds from each first sweep over masks to the first other sweep or round."""
    total, since = 0.0, None
    for event in events:
        if event["event"] not in ("sweep", "round"):
            continue
        masked = event.get("name", "").startswith(_MASKED)
        if masked and since is None:
            since = event["seconds"]
        elif not masked and since is not None:
            total += event["seconds"] - since
            since = None
    return total


def measure(model: str, ranks: int, options: list[str], folder: Path) -> dict[str, Any]:
    """Prune once; return the seconds of masked evaluation and of all, and a hash of the weights."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    out = folder / f"ranks-{ranks}"
    words = ["prune", model, "--out", str(out), "--overwrite", "--no-report", *options, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "frugal_bonsai", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    lines = (out / "events.jsonl").read_text(encoding="utf-8").splitlines()
    weights = hashlib.sha256()
    for path in sorted(out.glob("*.safetensors")):
        weights.update(path.read_bytes())
    return {
        "ranks": ranks,
        "masked": masked_seconds([json.loads(line) for line in lines]),
        "whole": float(json.loads(done.stdout)["seconds"]),
        "weights": weights.hexdigest()[:16],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, options = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    found: dict[int, list[dict[str, Any]]] = {1: [], given.ranks: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(given.repeat):
            for ranks, runs in found.items():
                runs.append(measure(given.model, ranks, options, Path(folder)))
                print(json.dumps(runs[-1]), file=sys.stderr)
    alone, together = found.values()
    for what in ("masked", "whole"):
        one, many = (statistics.median(run[what] for run in runs) for runs in (alone, together))
        efficiency = one / (given.ranks * many)
        print(f"{what}: {one:.1f} s alone, {many:.1f} s on {given.ranks} ranks: {efficiency:.2f}")
    same = len({run["weights"] for runs in found.values() for run in runs}) == 1
    print(f"weights: {'the same bytes' if same else 'DIFFERENT bytes'}")


if __name__ == "__main__":
    main()
