"""The command line of a run, so that `runs` can print the line that resumes it.

In: a command, a model, options. Out: words, in which a local path is relative to the folder around
the run directory; and these words for another folder. Imports no torch.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from frugal_bonsai.run.options import CommandOptions

# A word of a command line, or {"path": ..., "before": ...}: a path, and the text in front of it.
Word = str | dict[str, str]
_PATHS = {
    "calibration",
    "eval_text",
    "profile",
    "teacher",
    "teacher_cache",
    "data",
    "task_data",
}
_FLAGS = {
    "optimiser": "--optimizer",
    "seconds": "--minutes",
    "as_mistral": "--as-mistral",
    "text_only": "--text-only",
}
# Flags that only switch on.
_ON = {"as_mistral", "text_only"}


def command_arguments(command: str, model: str, out: Path, options: CommandOptions) -> list[Word]:
    """Return the words of a command line with these options; those with defaults are left out."""
    base = out.absolute().parent
    words: list[Word] = [command, _path_word(model, base), "--out", {"path": out.name}]
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name == "settings":
            for name, setting in value.items():
                words += _option(name, setting, base)
        elif value != field.default and value not in ((), {}):
            words += _option(field.name, value, base)
    return words


def _option(name: str, value: Any, base: Path) -> Iterator[Word]:
    flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
    if value is None or (name in _ON and not value):
        return
    if isinstance(value, bool):
        off = f"--no-{name.replace('_', '-')}"
        yield flag if value else off
        return
    if name == "seconds":
        value = value / 60
    if name in ("hidden_layers", "eval_tasks") and not isinstance(value, str):
        value = ",".join(map(str, value))
    many = isinstance(value, Sequence) and not isinstance(value, str)
    for each in value if many else [value]:
        yield flag
        yield _path_word(str(each), base) if name in _PATHS else str(each)


def _path_word(text: str, base: Path) -> Word:
    """Return a text as it is, or as a relative path if it is a path on this machine."""
    before, equals, after = text.partition("=")
    if equals and Path(after).exists():  # an item of --task-data
        return {"path": _relative(Path(after), base), "before": f"{before}="}
    path = Path(text).expanduser()
    if not path.exists() and not path.is_absolute():
        return text
    return {"path": _relative(path, base)}


def _relative(path: Path, base: Path) -> str:
    try:
        return Path(os.path.relpath(path.absolute(), base)).as_posix()
    except ValueError:  # another drive on Windows
        return path.name


def command_line(words: Sequence[Any], base: Path) -> str:
    """Return words as a line for a shell in the current folder.

    Args:
        words: Result of :func:`command_arguments`, from an event.
        base: Folder that the paths are relative to.
    """
    return shlex.join(["frugal-bonsai", *(_word(word, base) for word in words)])


def _word(word: Any, base: Path) -> str:
    if not isinstance(word, Mapping):
        return str(word)
    path = os.path.normpath(base.absolute() / str(word.get("path", "")))
    try:
        near = os.path.relpath(path)
    except ValueError:
        near = path
    return str(word.get("before", "")) + (path if near.count("..") > 2 else near)
