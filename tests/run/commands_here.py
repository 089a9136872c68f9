"""Commands that run in this process, for tests in which a process of their own is not the point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from commands import forget_peak

from frugal_bonsai.cli import cli


def here(*words: str | Path) -> str:
    """The standard output of a command that must succeed."""
    forget_peak()
    done = CliRunner().invoke(cli, [str(word) for word in words], env={"COLUMNS": "100"})
    if done.exception is not None:
        raise done.exception
    return done.stdout


def result(*words: str | Path) -> dict[str, Any]:
    """The JSON object of a command that must succeed."""
    found: dict[str, Any] = json.loads(here(*words, "--json"))
    return found
