"""Processes that have imported nothing but libraries, started in a moment.

To import torch and transformers takes seconds, and dozens of tests want a process of their own with
nothing else in it: plain transformers, or the command line. So one process imports the libraries,
and no more, when the first test asks; each test's code runs in a fork of it, which ends with it.
Where processes cannot be forked safely each test has a new one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

TRANSFORMERS = """
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
torch.set_num_threads(1)
"""

SERVER = """
import json, os, signal, sys, traceback
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(job["seconds"])
            os.chdir(job["folder"])
            for name, stream in (("output", 1), ("errors", 2)):
                os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
            sys.argv = ["-c", *job["arguments"]]
            exec(compile(job["code"], "code", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else ended.code is not None
            if isinstance(ended.code, str):
                print(ended.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

TIMEOUT_SECONDS = 600


class FreshProcesses:
    """Runs code where some libraries are imported, and nothing of this package is.

    Args:
        libraries: code that imports them.
        environment: of every process.
        flags: of the interpreter.
    """

    def __init__(
        self, libraries: str, environment: Mapping[str, str], flags: Sequence[str] = ()
    ) -> None:
        self._libraries, self._environment, self._flags = libraries, environment, flags
        self._server: subprocess.Popen[str] | None = None

    def run(self, code: str, *arguments: str | Path, folder: Path) -> str:
        """Run code to its end, which must be a good one; its standard output.

        Args:
            code: finds the arguments in ``sys.argv``.
            arguments: of the code.
            folder: to run in.
        """
        done = self.execute(code, *arguments, folder=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def execute(
        self, code: str, *arguments: str | Path, folder: Path
    ) -> subprocess.CompletedProcess[str]:
        """As :meth:`run`, whatever the end; one that takes ten minutes is an end too."""
        words = [str(argument) for argument in arguments]
        if sys.platform == "linux":
            return self._forked(code, words, folder)
        return subprocess.run(
            [sys.executable, *self._flags, "-c", code, *words],
            env=self._environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )

    def _forked(
        self, code: str, words: list[str], folder: Path
    ) -> subprocess.CompletedProcess[str]:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, *self._flags, "-c", self._libraries + SERVER],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as streams:
            output, errors = (Path(streams) / name for name in ("output", "errors"))
            job = {
                "code": code,
                "arguments": words,
                "folder": str(folder),
                "output": str(output),
                "errors": str(errors),
                "seconds": TIMEOUT_SECONDS,
            }
            print(json.dumps(job), file=self._server.stdin, flush=True)
            status = int(self._server.stdout.readline())
            texts = [path.read_text(encoding="utf-8") for path in (output, errors)]
        return subprocess.CompletedProcess(words, status, *texts)

    def close(self) -> None:
        """End the process that is forked."""
        if self._server is not None:
            self._server.kill()  # it holds nothing, and would take seconds to end by itself
            self._server.communicate()


def plain_transformers(home: Path) -> FreshProcesses:
    """Processes with torch and transformers, as on a machine without this package's sources.

    Args:
        home: for what transformers keeps: its cache and the modules of bundled code.
    """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home / "home"),
        "HF_MODULES_CACHE": str(home / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    return FreshProcesses(TRANSFORMERS, environment, flags=["-I"])
