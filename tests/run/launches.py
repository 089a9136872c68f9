"""Commands on several ranks, as a launcher starts them, without the seconds of each start."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import commands
from commands import forked_python

# Forks the ranks, kills those that it is told to once a file appears, and waits for all.
_LAUNCHER = """
import json, os, signal, sys, time, traceback
from pathlib import Path
job = json.loads(sys.argv[1])
pids = []
for rank in job["ranks"]:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.chdir(rank["folder"])
            os.environ.update(rank["environment"])
            for name, stream in (("output", 1), ("errors", 2)):
                os.dup2(os.open(rank[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
            sys.argv = ["-c", *rank["words"]]
            exec(compile(job["code"], "code", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    pids.append(pid)
for killed in job["killed"]:
    until = time.monotonic() + 60
    while not Path(job["once"]).exists() and time.monotonic() < until:
        time.sleep(0.002)
    os.kill(pids[killed], job["signal"])
killed = time.monotonic()
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
print(json.dumps({"codes": codes, "seconds": time.monotonic() - killed}))
"""


# Short texts, of which few are then written in several groups, which ranks share.
_SMALL_GROUPS = """
from frugal_bonsai.memory import work
work._CPU_TEXTS, work._WRITTEN_TOKENS = 16, 16
"""


@dataclass(frozen=True)
class Launched:
    """The end of a launch.

    Attributes:
        codes: exit code of each rank, negative for a signal.
        outputs: standard output of each rank.
        errors: standard error of each rank.
        seconds: from the signal, or the start, until all have ended.
    """

    codes: list[int]
    outputs: list[str]
    errors: list[str]
    seconds: float


@dataclass(frozen=True)
class Rank:
    """One rank of a launch.

    Attributes:
        folder: that it runs in.
        environment: beside the launcher's.
    """

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)


def launch(
    folder: Path,
    *words: str | Path,
    ranks: list[Rank] | int,
    killed: tuple[int, ...] = (),
    signal: int = 9,
    once: Path | None = None,
) -> Launched:
    """Run a command on several ranks to their ends.

    Args:
        folder: for what the ranks print; they run there unless they have their own.
        words: of the command line.
        ranks: the ranks, or their number.
        killed: ranks that get a signal.
        signal: the signal.
        once: file whose appearance is waited for before.
    """
    places = [Rank(folder)] * ranks if isinstance(ranks, int) else ranks
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    size = {"WORLD_SIZE": str(len(places)), "LOCAL_WORLD_SIZE": str(len(places))}
    jobs: list[dict[str, Any]] = []
    for rank, place in enumerate(places):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if len(places) > 1 else {}
        jobs.append(
            {
                "folder": str(place.folder),
                "environment": {**address, **size, **own, **place.environment},
                "words": [str(word) for word in words],
                "output": str(folder / f"output-{rank}"),
                "errors": str(folder / f"errors-{rank}"),
            }
        )
    job = {
        "ranks": jobs,
        "code": _SMALL_GROUPS + commands.MAIN,
        "killed": killed,
        "signal": signal,
        "once": str(once),
    }
    ended = json.loads(forked_python(_LAUNCHER, json.dumps(job)))
    texts = [[Path(j[name]).read_text(encoding="utf-8") for j in jobs] for name in _STREAMS]
    return Launched(ended["codes"], *texts, seconds=ended["seconds"])


_STREAMS = ("output", "errors")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def no_process_works_in(folder: Path) -> bool:
    """Return whether no process is left whose command line names a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in entry.read_bytes():
                found.append(entry)
        except OSError:
            continue
    return not [entry for entry in found if entry.parent.name != str(os.getpid())]
