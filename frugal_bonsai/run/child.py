"""A child process that answers questions, one JSON object a line.

In: a module of this package that runs as ``python -m``, and questions. Out: its answers, or its end
as an error. A model that is loaded in a child has its memory measured alone, and an assertion of
llama.cpp ends the child only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from frugal_bonsai.errors import BenchError, FrugalBonsaiError


class Child:
    """A process that is killed at the end of a ``with`` block.

    Args:
        module: Module that calls :func:`serve`.
        name: What runs in it, for error texts.
        threads: Number of CPU threads; None keeps the environment's.
    """

    def __init__(self, module: str, name: str, threads: int | None) -> None:
        self._name = name
        # The output of libraries is not this command's; its end explains a failure.
        self._log = tempfile.TemporaryFile()
        environment = dict(os.environ)
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env=environment,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a question.

        Raises:
            BenchError: The child answered with an error, or its process ended.
        """
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        except OSError:
            pass  # the process has ended, and the answer is empty
        answer = process.stdout.readline()
        if not answer:
            raise BenchError(
                f"{self._name}: its process ended with code {process.wait()}; is there enough "
                f"memory? {self._last_words()}"
            )
        values: dict[str, Any] = json.loads(answer)
        if "error" in values:
            raise BenchError(f"{self._name}: {values['error']} {self._last_words()}".rstrip())
        return values

    def _last_words(self) -> str:
        """Return the errors that llama.cpp logged, or the end of the log."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").splitlines()
        errors = [line for line in lines if " E " in line]
        return "\n".join(errors[:3] or lines[-3:])


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer the lines of standard input, until it ends or a user's error does.

    Args:
        answer: Returns the answer to a question.
    """
    # Libraries may print, so they get standard error and the answers keep standard output.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            values = answer(json.loads(line))
        except FrugalBonsaiError as error:
            values = {"error": str(error)}
        channel.write(json.dumps(values) + "\n")
        channel.flush()
        if "error" in values:
            return
