"""Print one Markdown row for each ``prune --json`` file named: what docs/results/ is made of.

python tools/results_table.py RUN.json [...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    print("| run | layout | removed | perplexity | forward tokens | seconds | peak host |")
    print("|---|---|---|---|---|---|---|")
    for name in sys.argv[1:]:
        path = Path(name)
        run = json.loads(path.read_text(encoding="utf-8"))
        after, memory = run["after"], run["memory"]
        print(
            f"| {path.stem} | {run['layout']} | {run['sparsity']:.2%} | "
            f"{after['eval_perplexity']:.2f} | {run['forward_tokens'] / 1e6:.2f} M | "
            f"{run['seconds']:.0f} | {memory['host_peak_bytes'] / 2**20:.0f} MiB |"
        )


if __name__ == "__main__":
    main()
