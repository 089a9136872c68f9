"""What must not happen while a case runs: files outside its folder, programs, network, pickles.

In: the folder of a case. Out: the list of what happened. Python reports these through audit hooks,
which cannot be removed: the hook does nothing outside of :func:`watched`. Files that compiled code
opens itself are not seen.
"""

from __future__ import annotations

import os
import site
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from frugal_bonsai.errors import FrugalBonsaiError

_REFUSED = {
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile"),
    *("socket.connect", "socket.getaddrinfo", "pickle.find_class", "ctypes.dlopen"),
}
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod"}


class _Watch:
    """The state of the hook."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.readable: tuple[str, ...] = ()
        self.seen: list[str] = []
        packages = [str(Path(__file__).resolve().parents[2]), *site.getsitepackages()]
        places = (*packages, sys.prefix, sys.base_prefix, "/proc", "/sys", "/usr", "/dev/null")
        self.allowed = tuple(os.path.realpath(place) for place in places)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in _REFUSED and arguments[0] is not None:
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            read = path.startswith((*self.allowed, *self.readable))
            if not self._inside(path) and (writes or not read):
                self.seen.append(f"opens {path}")
        elif event in _CHANGES and (changed := _changed(event, arguments)) is not None:
            if not self._inside(os.path.realpath(changed.parent) + "/" + changed.name):
                self.seen.append(f"{event} {changed}")

    def _inside(self, path: str) -> bool:
        own = (f"{tempfile.gettempdir()}/{name}" for name in ("frugal-bonsai-gguf-", "tmp"))
        return path == self.folder or path.startswith((f"{self.folder}/", *own))


def _changed(event: str, arguments: tuple[Any, ...]) -> Path | None:
    """Return the path that a call changes; None for a name inside an open folder."""
    if arguments[-1] not in (-1, None) and event != "os.rename":
        return None
    # A link is made where the second argument says.
    return Path(os.fsdecode(arguments[event in ("os.link", "os.symlink")]))


_WATCH = _Watch()


def install() -> None:
    """Install the hook, once a process."""
    if not getattr(sys, "_frugal_bonsai_watched", False):
        sys.addaudithook(_WATCH.hook)
        sys._frugal_bonsai_watched = True  # type: ignore[attr-defined]


@contextmanager
def watched(folder: Path, readable: Sequence[Path]) -> Iterator[list[str]]:
    """Report what happens outside a folder while the block runs.

    Args:
        folder: the folder of a case.
        readable: other folders that may be read.
    """
    _WATCH.folder, _WATCH.seen = os.path.realpath(folder), []
    _WATCH.readable = tuple(os.path.realpath(place) + "/" for place in readable)
    try:
        yield _WATCH.seen
    finally:
        _WATCH.folder = None


def is_refusal(error: BaseException) -> bool:
    """Return whether an error is one that the user can mend."""
    import click

    return isinstance(error, FrugalBonsaiError | click.ClickException)
