"""The command line as users use it: subprocesses, one thread, offline."""

from __future__ import annotations

import atexit
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any
from unittest import mock

from fresh_process import TIMEOUT_SECONDS, TRANSFORMERS, FreshProcesses

from frugal_bonsai.cli import main

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}

# What a command imports beside this package, which every process imports for itself.
_LIBRARIES = f"""{TRANSFORMERS}
import contextlib, logging
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
with contextlib.suppress(ImportError):
    import bitsandbytes
logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)
"""
# As in conftest.py, a prune without a profile measures each rate twice only, and the processor's
# once for all commands; the page beside an output has no figures, which take a second.
_RATES = Path(tempfile.mkdtemp(prefix="rates-"), "rates.pickle")
MAIN = f"""
import pathlib, pickle, sys
from frugal_bonsai.cli import main
from frugal_bonsai.run import machine, profile, report
profile._QUICK_SECONDS = 0.0
measure, path = machine.quick_profile, pathlib.Path({str(_RATES)!r})
def rates(device):
    if device.type != "cpu":
        return measure(device)
    if not path.exists():
        path.write_bytes(pickle.dumps(measure(device)))
    return pickle.loads(path.read_bytes())
machine.quick_profile = rates
report.require_plots, report.draw_figures = lambda: None, lambda charts: {{}}
sys.argv[0] = "frugal-bonsai"
main()
"""
_processes = FreshProcesses(_LIBRARIES, ENVIRONMENT)
atexit.register(_processes.close)
atexit.register(shutil.rmtree, _RATES.parent, ignore_errors=True)


def frugal_bonsai(
    *words: str | Path, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end, in a process of its own that has torch already.

    Args:
        words: of the command line.
        folder: to run in; None stays where the tests run.
    """
    return _processes.execute(MAIN, *words, folder=folder or Path.cwd())


def started(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """As ``frugal_bonsai``, from a start of Python on: what it imports and holds is its own."""
    return subprocess.run(
        [sys.executable, "-m", "frugal_bonsai", *map(str, words)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=TIMEOUT_SECONDS,
        **options,
    )


def succeed(*words: str | Path, run: Any = frugal_bonsai) -> dict[str, Any]:
    """Run a command with ``--json`` that must succeed; its one JSON object.

    Args:
        words: of the command line.
        run: ``frugal_bonsai`` or ``started``.
    """
    done = run(*words, "--json")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def fail(*words: str | Path) -> str:
    """Run a command in this process that must fail as a user's error; its text.

    The entry point itself runs, as in ``frugal_bonsai(...)``, without the seconds of a start.
    """
    errors = io.StringIO()
    forget_peak()
    with mock.patch("sys.argv", ["frugal-bonsai", *map(str, words)]), redirect_stderr(errors):
        try:
            main()
        except SystemExit as ended:
            assert ended.code == 2, (ended.code, errors.getvalue())
            return errors.getvalue()
    raise AssertionError(f"succeeded: {words}")


def forget_peak() -> None:
    """Let this process's peak memory be what it holds now: a command's plan starts from it.

    Tests that ran before may have held gigabytes, which a command of its own would not find.
    """
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5", encoding="ascii")


def forked_python(code: str, *arguments: str | Path) -> str:
    """Run code in a process that has imported torch and transformers; return what it prints."""
    return _processes.run(code, *arguments, folder=Path.cwd())


def python(code: str, *arguments: str | Path, **environment: str) -> str:
    """Run code in a fresh Python; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, **environment},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
