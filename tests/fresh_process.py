"""Plain transformers in a process that has never seen this package.

To import torch and transformers takes seconds, and dozens of tests want nothing else in their
process. So one process imports them, and no more, when the first test asks; each test's code runs
in a fork of it, which ends with it. Where processes cannot be forked safely each test has a new
one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SERVER = """
import json, os, sys, traceback
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
torch.set_num_threads(1)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(job["folder"])
            for name, stream in (("output.txt", 1), ("errors.txt", 2)):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
            sys.argv = ["-c", *job["arguments"]]
            exec(compile(job["code"], "code", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class FreshProcesses:
    """Runs code where torch and transformers are imported, and nothing of this package is.

    Args:
        home: for what transformers keeps: its cache and the modules of bundled code.
    """

    def __init__(self, home: Path) -> None:
        self._environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(home / "home"),
            "HF_MODULES_CACHE": str(home / "modules"),
            "OMP_NUM_THREADS": "1",
        }
        self._server: subprocess.Popen[str] | None = None

    def run(self, code: str, *arguments: str | Path, folder: Path) -> str:
        """Run code to its end, which must be a good one; its standard output.

        Args:
            code: finds the arguments in ``sys.argv``.
            arguments: of the code.
            folder: to run in.
        """
        words = [str(argument) for argument in arguments]
        if sys.platform == "linux":
            status, output, errors = self._forked(code, words, folder)
        else:
            done = subprocess.run(
                [sys.executable, "-I", "-c", code, *words],
                env=self._environment,
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
            status, output, errors = done.returncode, done.stdout, done.stderr
        assert status == 0, errors[-3000:]
        return output

    def _forked(self, code: str, words: list[str], folder: Path) -> tuple[int, str, str]:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-I", "-c", SERVER],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._server.stdin is not None and self._server.stdout is not None
        job = {"code": code, "arguments": words, "folder": str(folder)}
        print(json.dumps(job), file=self._server.stdin, flush=True)
        status = int(self._server.stdout.readline())
        output, errors = (folder / name for name in ("output.txt", "errors.txt"))
        return status, output.read_text(encoding="utf-8"), errors.read_text(encoding="utf-8")

    def close(self) -> None:
        """End the process that is forked."""
        if self._server is not None:
            self._server.kill()  # it holds nothing, and would take seconds to end by itself
            self._server.communicate()
