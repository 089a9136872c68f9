"""Check a GPU in eight minutes: the command for the first machine that has one.

    python tools/gpu_check.py [--device cuda] [--out DIR] [--only race,speed] [--dry-run]
    python tools/gpu_check.py --render docs/results/gpu_check.jsonl

It runs from the source tree, installs and downloads nothing, and makes its own models. Each step
(gpu_checks/steps.py) has its own process and time limit. The most valuable steps come first. A step
that cannot end in the remaining time does not start. Each figure is one JSON line: it is printed at
once and appended to ``OUT/gpu_check.jsonl``. A failed step is a line too. After each step the lines
are rendered as the page ``OUT/gpu_<card>_<date>.md``.

``--dry-run`` runs the same code with tiny shapes on a simulated GPU (tests/stand_in_device), all
steps in one process. Its figures mean nothing, but it shows that no step ends in a typing error.
``--dry-run --device cpu`` uses the CPU instead.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tools"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from gpu_checks.check import (  # noqa: E402  # nothing is installed: the path is set first
    DONE,
    FAILURE,
    MACHINE,
    Book,
    Check,
    Line,
    failure,
    log_tail,
    read_lines,
    skipped,
)
from gpu_checks.page import write_page  # noqa: E402
from gpu_checks.processes import child_environment, run_child  # noqa: E402
from gpu_checks.steps import STEPS, Step  # noqa: E402

LINES = "gpu_check.jsonl"
# Of a dry run: the stand-in of tests/stand_in_device.
DRY_DEVICE = "cuda"
# The facts of the machine are asked by a process of their own: this one never touches the device.
_FACTS = Step(name=MACHINE, home="", about="", limit_seconds=90, needs_seconds=0)


def main() -> None:
    """Run what the command line says; ends with 1 where a step has failed."""
    options = _options()
    if options.render is not None:
        folder = options.out or options.render.parent
        print(write_page(read_lines(options.render), folder))
    elif options.step is not None:
        sys.exit(run_here(options))
    else:
        sys.exit(check_all(options))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", help="cuda (the default), cuda:N or cpu")
    parser.add_argument("--out", type=Path, help="folder of the results (docs/results)")
    parser.add_argument("--only", help="names of steps, with commas between them")
    parser.add_argument("--budget-seconds", type=float, default=480.0, help="for all steps")
    parser.add_argument("--scratch", type=Path, help="folder for models and stores (3 GB)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on a CPU")
    parser.add_argument("--processes", action="store_true", help="in a dry run too")
    parser.add_argument("--render", type=Path, help="make the page of these lines; run nothing")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = [step.name for step in STEPS]
    unknown = set((options.only or known[0]).split(",")) - set(known)
    if unknown:
        parser.error(f"--only: unknown steps {sorted(unknown)}, known are {', '.join(known)}")
    options.device = options.device or (DRY_DEVICE if options.dry_run else "cuda")
    return options


def check_all(options: argparse.Namespace) -> int:
    """Run the steps one after the other; 1 where one has failed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a child is ended too
    started = time.monotonic()
    out = options.out
    if out is None:
        results = ROOT / "docs" / "results"
        out = Path(tempfile.mkdtemp(prefix="gpu-check-")) if options.dry_run else results
    options.out = out = out.absolute()
    failures = 0

    def write(line: Line) -> None:
        nonlocal failures
        failures += line["kind"] == FAILURE
        book.write({**line, "command": _command(options)} if line["kind"] == MACHINE else line)

    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=options.scratch) as work:
        options.work = Path(work)
        book = Book(out / LINES, {work: "WORK", sys.prefix: "PYTHON", f"{ROOT}/": ""})
        chosen = None if options.only is None else options.only.split(",")
        steps = [step for step in STEPS if chosen is None or step.name in chosen]
        start(_FACTS, options, _FACTS.limit_seconds, write)
        if failures:
            return 1
        for step in steps:
            left = options.budget_seconds - (time.monotonic() - started)
            if left < step.needs_seconds:
                why = f"{left:.0f} s of the budget are left, it needs {step.needs_seconds:.0f}"
                write(skipped(step.name, why))
            else:
                begun = time.monotonic()
                start(step, options, min(step.limit_seconds, left), write)
                seconds = round(time.monotonic() - begun, 1)
                write({"step": step.name, "kind": DONE, "seconds": seconds})
            page = write_page(read_lines(book.path), out)
    print(page, file=sys.stderr)
    return int(failures > 0)


def start(
    step: Step, options: argparse.Namespace, seconds: float, write: Callable[[Line], None]
) -> None:
    """Run a step in a separate process; in a dry run, in this one."""
    until = time.time() + seconds
    if _together(options):
        run_step(step, options, until, write)
        return
    log = options.work / f"{step.name}.log"
    words = [*_arguments(step, options), "--until", f"{until:.1f}"]
    threads = {"OMP_NUM_THREADS": "1"} if options.dry_run else {}
    ended = run_child(words, seconds=seconds, log=log, write=write, add=threads, own_group=True)
    if ended.error is not None:
        last = log_tail(log)
        write(failure(step.name, step.name, ended.error, "; ".join(last[-1:]), last))


def _together(options: argparse.Namespace) -> bool:
    """True if all steps run in this process."""
    return bool(options.dry_run and not options.processes)


def _arguments(step: Step, options: argparse.Namespace) -> list[str]:
    """The command line of a step's process."""
    words = ["--step", step.name, "--device", options.device]
    words += ["--work", str(options.work), "--out", str(options.out)]
    return words + ["--dry-run", "--processes"] * options.dry_run


def run_here(options: argparse.Namespace) -> int:
    """The step that a process was started for; its lines go to standard output, nothing else."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print
    failures = 0

    def write(line: Line) -> None:
        nonlocal failures
        failures += line["kind"] == FAILURE
        channel.write(json.dumps(line) + "\n")
        channel.flush()

    step = next(step for step in (_FACTS, *STEPS) if step.name == options.step)
    run_step(step, options, options.until, write)
    return int(failures > 0)


def run_step(
    step: Step, options: argparse.Namespace, until: float, write: Callable[[Line], None]
) -> None:
    """Run a step in this process, until the clock says so at most."""
    os.environ.update(child_environment({}))
    import torch
    from gpu_checks.machine import computing_device, machine_line

    if options.dry_run:
        torch.set_num_threads(1)
    with computing_device(options.device, dry=options.dry_run) as device:
        check = Check(
            step.name,
            device=device,
            dry=options.dry_run,
            work=options.work,
            out=options.out,
            until=until,
            write=write,
            arguments=None if _together(options) else _arguments(step, options),
        )
        if step is _FACTS:
            with check.part(MACHINE):
                write(machine_line(device, dry=options.dry_run))
        else:
            step.run(check, options.variant)


def _command(options: argparse.Namespace) -> str:
    """The command that a reader runs to do the same again."""
    words = ["python tools/gpu_check.py"]
    words += [] if options.device == "cuda" else ["--device", options.device]
    words += [] if options.only is None else ["--only", options.only]
    return " ".join(words + ["--dry-run"] * options.dry_run)


if __name__ == "__main__":
    main()
