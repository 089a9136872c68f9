"""Run cases in a process of their own, which may die or hang without ending the others.

In: a target, samples, numbers of cases. Out: a :class:`Failure` for each kind of failure, with the
number of its first case. A case is a function of seed, target and number alone.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from fuzzing.mutate import Mutator
from fuzzing.samples import Samples
from fuzzing.targets import LINKED, SECRET, WEIGHTS, Run
from fuzzing.watch import install, is_refusal, watched

SLOW_SECONDS = 3.0  # of processor time, for one case
HANG_SECONDS = 60.0
MEMORY_BYTES = 2**30  # that a case may take beyond what the process has


@dataclass
class Failure:
    """A kind of failure.

    Attributes:
        what: the error and where it was raised.
        case: number of the first case.
        trace: its traceback.
        count: number of cases.
    """

    what: str
    case: int
    trace: str
    count: int = 1


def run_case(
    run: Run, samples: Samples, place: Path, seed: str, *, keep: bool = False
) -> tuple[str, str] | None:
    """Run one case; return what failed and a traceback, or None."""
    folder = place / "case"
    folder.mkdir()
    model = str(place / "outside" / WEIGHTS)
    outside = ("../outside/" + WEIGHTS, model, "../outside/secret.json", "/etc/passwd", "~")
    mutator = Mutator(random.Random(seed), outside)
    began, failed = time.process_time(), None
    try:
        with watched(folder, (samples.folder, place / LINKED)) as seen:
            run(samples, mutator, folder)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        if not is_refusal(error):
            failed = (_where(error), traceback.format_exc())
    if failed is None and seen:
        failed = (f"outside: {_general(seen[0])}", "\n".join(seen))
    if failed is None and (taken := time.process_time() - began) > SLOW_SECONDS:
        failed = ("slow", f"took {taken:.1f} s")
    if not keep:
        shutil.rmtree(folder)
    return failed


def make_outside(place: Path, model: Path) -> None:
    """Write files beside the folder of a case: it must not read those in ``outside``.

    Those in :data:`LINKED` may be read where links lead to them, and must not be copied.
    """
    for outside in (place / "outside", place / LINKED):
        outside.mkdir()
        shutil.copy(model / WEIGHTS, outside / WEIGHTS)
        (outside / "secret.json").write_text(json.dumps({"token": SECRET}))


def run_cases(run: Run, name: str, samples: Samples, seed: int, cases: range) -> list[Failure]:
    """Run cases in child processes, one after the other."""
    found: dict[str, Failure] = {}
    begin = cases.start
    while begin < cases.stop:
        begin = _run_child(run, name, samples, seed, range(begin, cases.stop), found)
    return list(found.values())


def _run_child(
    run: Run, name: str, samples: Samples, seed: int, cases: range, found: dict[str, Failure]
) -> int:
    """Run cases in one child until it ends; return the number of the next case."""
    heart = mmap.mmap(-1, 8)  # number of the case that runs
    heart[:] = struct.pack("<q", cases.start)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        place = Path(temporary)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _work(run, name, samples, seed, cases, heart, place)
                code = 0
            finally:
                os._exit(code)
        code = _wait(child, heart)
        at = int(struct.unpack("<q", heart[:])[0])
        lines = place / "failures"
        for line in lines.read_text().splitlines() if lines.exists() else ():
            _add(found, Failure(**json.loads(line)))
        if code == 0:
            return cases.stop
        trace = (place / "stack").read_text() if (place / "stack").exists() else ""
        what = "hang" if code == -signal.SIGKILL else f"died with {code}"
        _add(found, Failure(f"{what}: {_last_own(trace)}", at, trace))
        return at + 1


def _add(found: dict[str, Failure], failure: Failure) -> None:
    if failure.what in found:
        found[failure.what].count += failure.count
    else:
        found[failure.what] = failure


def _work(
    run: Run,
    name: str,
    samples: Samples,
    seed: int,
    cases: range,
    heart: mmap.mmap,
    place: Path,
) -> None:
    """Run cases; the body of a child."""
    install()
    with (place / "stack").open("w") as stack, (place / "failures").open("w") as failures:
        faulthandler.enable(stack)
        faulthandler.register(signal.SIGUSR1, stack)
        make_outside(place, samples.models[0])
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        limit_memory(MEMORY_BYTES)
        for case in cases:
            heart[:] = struct.pack("<q", case)
            failed = run_case(run, samples, place, f"{seed}/{name}/{case}")
            if failed is not None:
                failure = {"what": failed[0], "case": case, "trace": failed[1]}
                failures.write(json.dumps(failure) + "\n")
                failures.flush()


def limit_memory(more_bytes: int) -> None:
    """Let this process have so many bytes of addresses more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def _wait(child: int, heart: mmap.mmap) -> int:
    """Wait for a child; one that does not move is killed."""
    seen, since = bytes(heart[:]), time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if bytes(heart[:]) != seen:
            seen, since = bytes(heart[:]), time.monotonic()
        elif time.monotonic() - since > HANG_SECONDS:
            os.kill(child, signal.SIGUSR1)
            time.sleep(1)
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)


def _where(error: BaseException) -> str:
    """Return an error's class and the last place in this program that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "frugal_bonsai/" in frame.filename] or frames
    name = own[-1].filename.rpartition("frugal_bonsai/")[2]
    return f"{type(error).__name__} at {name}:{own[-1].lineno} {own[-1].name}"


def _last_own(trace: str) -> str:
    own = [line.strip() for line in trace.splitlines() if "frugal_bonsai/" in line]
    return own[0].rpartition("frugal_bonsai/")[2] if own else "no stack"


def _general(text: str) -> str:
    """Return what was opened without the parts that differ from case to case."""
    return text.rpartition("/")[0][-60:] if text.startswith("opens") else text[:60]
