"""Read hostile files of every kind: only errors that the user can mend, nothing else.

    python tools/fuzz.py [--cases 100000] [--targets gguf,mask] [--seed 0]
    python tools/fuzz.py --targets gguf --case 1234       one case again, with its traceback

A case mutates a valid file (fuzzing/mutate.py) and reads it as the commands do. It fails if an
error is none of the user's, if it hangs or dies, takes more than a gibibyte, opens a file outside
of its folder, starts a program, connects, or reads a pickle. A case is a function of seed, target
and number. Prints a table, and the traceback of each kind of failure; ends with 1 if there is any.
Linux only.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tools"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from fuzzing.run_targets import RUN_TARGETS  # noqa: E402  # nothing is installed
from fuzzing.samples import Samples, make_samples  # noqa: E402
from fuzzing.targets import MODEL_TARGETS  # noqa: E402
from fuzzing.watch import install  # noqa: E402
from fuzzing.worker import make_outside, run_case, run_cases  # noqa: E402

TARGETS = MODEL_TARGETS | RUN_TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this case of the first target alone")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    names = given.targets.split(",")
    with tempfile.TemporaryDirectory(prefix="fuzz-samples-") as temporary:
        samples = make_samples(Path(temporary))
        if given.case is not None:
            sys.exit(_one(names[0], samples, given.seed, given.case))
        sys.exit(_all(names, samples, given.seed, given.cases))


def _one(name: str, samples: Samples, seed: int, case: int) -> bool:
    """Run one case in this process; its files stay."""
    install()
    place = Path(tempfile.mkdtemp(prefix="fuzz-case-"))
    make_outside(place, samples.models[0])
    failed = run_case(TARGETS[name].run, samples, place, f"{seed}/{name}/{case}", keep=True)
    print(f"{place / 'case'}\n" + ("\n".join(failed) if failed else "no failure"))
    return failed is not None


def _all(names: list[str], samples: Samples, seed: int, cases: int) -> bool:
    """Run the cases of all targets, and print a table."""
    gc.collect()
    gc.freeze()  # children share what is there
    shares = sum(TARGETS[name].share for name in names)
    rows, failed = [], False
    for name in names:
        count = max(1, cases * TARGETS[name].share // shares)
        began = time.monotonic()
        found = run_cases(TARGETS[name].run, name, samples, seed, range(count))
        seconds = time.monotonic() - began
        for failure in sorted(found, key=lambda failure: -failure.count):
            print(f"--- {name}, case {failure.case}, {failure.count} times: {failure.what}")
            print(failure.trace, flush=True)
        failures = sum(failure.count for failure in found)
        rows.append((name, count, f"{seconds:.0f}", f"{count / seconds:.0f}", failures))
        print(*rows[-1], flush=True)
        failed |= failures > 0
    print("\n| input | cases | seconds | cases a second | failures |\n|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print(f"{sum(row[1] for row in rows)} cases, seed {seed}")
    return failed


if __name__ == "__main__":
    main()
