"""Processes of the check: each with a time limit, its lines read as they come.

A child writes one JSON line a figure to its standard output; what else is printed goes to a log.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.py"


@dataclass(frozen=True)
class Ended:
    """The end of a child process.

    Attributes:
        failed: it wrote a line of a failure itself.
        error: why it ended without one, if it did not end well.
    """

    failed: bool
    error: str | None


def child_environment(add: Mapping[str, str]) -> dict[str, str]:
    """This process's environment: the source tree importable, nothing downloaded."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    known = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **known, "TOKENIZERS_PARALLELISM": "false", **add}


def run_child(
    words: list[str],
    *,
    seconds: float,
    log: Path,
    write: Callable[[dict[str, Any]], None],
    add: Mapping[str, str],
    own_group: bool = False,
) -> Ended:
    """Run this tool with other arguments.

    Args:
        words: the arguments.
        seconds: after which the child is killed.
        log: takes its error output.
        write: is given each of its lines as it comes.
        add: to its environment.
        own_group: it leads a process group, and what it has started is killed with it.
    """
    kinds: set[str] = set()
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env=child_environment(add),
            start_new_session=own_group,
        )
        assert process.stdout is not None
        reader = threading.Thread(target=_pass_on, args=(process.stdout, write, kinds), daemon=True)
        reader.start()
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return Ended("failure" in kinds, f"timed out after {seconds:.0f} s")
        finally:
            _kill(process, own_group=own_group)
            reader.join(timeout=5)
    code, failed = process.returncode, "failure" in kinds
    return Ended(failed, None if code == 0 or failed else _how(code))


def _pass_on(lines: IO[str], write: Callable[[dict[str, Any]], None], kinds: set[str]) -> None:
    """Give each JSON line on; anything else is no line of the check."""
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        kinds.add(line.get("kind", ""))
        write(line)


def _kill(process: subprocess.Popen[str], *, own_group: bool) -> None:
    """End a child that still runs, and what it has started."""
    if process.poll() is not None:
        return
    if own_group and hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _how(code: int) -> str:
    """The end of a process that wrote no error, in words."""
    return f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
