"""Write files and directories atomically: they appear complete or not at all.

In: bytes, or a block of code that fills a directory. Out: a file or directory under its final name,
renamed from a temporary sibling after fsync. After any exception, Ctrl-C included, the temporary
sibling is removed and the final name does not exist. An error of the operating system becomes an
:class:`OutputError` that names the file and a remedy.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from frugal_bonsai.errors import OutputError
from frugal_bonsai.sizes import format_bytes

_FULL = {errno.ENOSPC, errno.EFBIG} | {getattr(errno, "EDQUOT", errno.ENOSPC)}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def output_errors(path: Path, size_bytes: int | None = None) -> Iterator[None]:
    """Turn an :class:`OSError` in the block into an :class:`OutputError` about ``path``.

    Args:
        path: what is written.
        size_bytes: bytes that are written, if they are known, for the error of a full disk.

    Raises:
        OutputError: the system refuses; of a full disk, the text states the free bytes.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in _FULL
        advice = _disk_is_full(path, error, size_bytes) if full else _advice(path, error)
        raise OutputError(f"{path}: {advice}") from error


@contextmanager
def replaced_file(path: Path, size_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Open a temporary sibling for writing and rename it to ``path`` if the block succeeds.

    Args:
        path: the file.
        size_bytes: its size, if it is known, for the error of a full disk.

    Raises:
        OutputError: the file cannot be created, written or renamed.
    """
    path = Path(path)
    temporary = partial_name(path)
    try:
        with output_errors(path, size_bytes):
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_directory(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically. An existing file is replaced.

    Raises:
        OutputError: the file cannot be written.
    """
    with replaced_file(path, len(data)) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


@contextmanager
def staged_directory(out: Path, *, replaces: Collection[str] = ()) -> Iterator[Path]:
    """Create a temporary sibling directory and rename it to ``out`` if the block succeeds.

    A missing parent of ``out`` is created. ``out`` itself may be an empty directory.

    Args:
        out: the directory.
        replaces: a directory with a file of one of these names is removed at the end, when the new
            one is complete.

    Yields:
        The temporary directory, ``.NAME.partial-XXXXXXXX`` beside ``out``.

    Raises:
        OutputError: ``out`` exists, or the parent cannot be written.
    """
    out = Path(out).resolve() if Path(out).exists() else Path(out).absolute()
    require_no_output(out, replaces=replaces)
    staging = partial_name(out)
    try:
        with output_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            staging.mkdir()
        yield staging
        require_no_output(out, replaces=replaces)
        with output_errors(out):
            sync_directory(staging)
            _rename_onto(staging, out, replace=bool(replaces))
            sync_directory(out.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _rename_onto(staging: Path, out: Path, *, replace: bool) -> None:
    """Rename a directory to a name that an empty directory or, to replace it, another one has."""
    if out.exists() and not replace:
        out.rmdir()  # empty; Windows does not rename onto a directory
    old = partial_name(out) if out.exists() else None
    if old is not None:
        out.rename(old)
    try:
        staging.rename(out)
    except OSError:
        if old is not None:
            old.rename(out)
        raise
    if old is not None:
        remove_folder(old)


def require_no_output(out: Path, *, replaces: Collection[str] = ()) -> None:
    """Check that a directory can be created under this name.

    Args:
        out: the directory.
        replaces: a directory with a file of one of these names may be replaced.

    Raises:
        OutputError: a file or another non-empty directory has the name, or a parent is a file.
    """
    with output_errors(out):
        if out.is_symlink():
            raise OutputError(
                f"{out}: is a symbolic link, which an output cannot replace; name the place that "
                f"it points to"
            )
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out}: exists and is no directory; choose a new name")
        if out.is_dir() and any(out.iterdir()):
            _require_replaceable(out, replaces)
        above = next(folder for folder in out.absolute().parents if folder.exists())
        if not above.is_dir():
            raise OutputError(f"{out}: {above} is a file, not a folder; choose another directory")


def _require_replaceable(out: Path, names: Collection[str]) -> None:
    """Raise unless a directory has a file of one of these names."""
    if not names:
        raise OutputError(
            f"{out}: the output directory exists and is not empty; choose another, remove it, or "
            "add --overwrite"
        )
    if not any((out / name).is_file() for name in names):
        raise OutputError(
            f"{out}: is not empty and holds none of {', '.join(names)}, so this program did not "
            "write it and --overwrite does not replace it; choose another directory, or remove it"
        )


def require_no_file(out: Path, example: str, *, replaces: bytes = b"") -> None:
    """Check that a new file can have this name.

    Args:
        out: the file.
        example: name of a file, for the error of a name that is a folder's.
        replaces: a file that begins with these bytes may be replaced; empty for none.

    Raises:
        OutputError: a folder or another file has the name.
    """
    if out.is_dir():
        raise OutputError(f"{out}: is a folder; name a file, such as {out / example}")
    if not out.exists() and not out.is_symlink():
        return
    if not replaces:
        raise OutputError(f"{out}: exists; name another file, remove it, or add --overwrite")
    with output_errors(out), out.open("rb") as file:
        if file.read(len(replaces)) != replaces:
            raise OutputError(
                f"{out}: exists and does not begin with {replaces.decode('ascii')!r}, so it is "
                "another kind of file and --overwrite does not replace it; name another file"
            )


def require_writable(out: Path) -> None:
    """Check that files can be created where an output is to appear.

    A file without a name is created and removed in the output's nearest existing parent.

    Raises:
        OutputError: the system refuses.
    """
    place = nearest_folder(out.absolute().parent)
    with output_errors(out), tempfile.TemporaryFile(dir=place):
        pass


def require_free_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Check that the disk has room for an output.

    Args:
        folder: the output's folder. If it does not exist, its nearest existing parent is checked.
        needed_bytes: bytes to be written.
        what: name of the output, for the error text.

    Raises:
        OutputError: the disk has too little room. The text states the needed and the free bytes.
    """
    place = nearest_folder(Path(folder).absolute())
    with output_errors(place):
        free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes:
        raise OutputError(
            f"{folder}: {what} needs {format_bytes(needed_bytes)}, the disk has "
            f"{format_bytes(free_bytes)} free; free {format_bytes(needed_bytes - free_bytes)} or "
            "choose a folder on another disk"
        )


def nearest_folder(place: Path) -> Path:
    """Return a path, or its nearest parent that exists."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def partial_name(path: Path) -> Path:
    """Return an unused name for a temporary sibling."""
    return path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")


def remove_partials(path: Path) -> None:
    """Remove the temporary siblings of a path, left by a process that was killed.

    The caller knows that no process writes there.
    """
    pattern = f".{glob.escape(path.name)}.partial-{'[0-9a-f]' * 8}"
    for left_over in path.parent.glob(pattern):
        if left_over.is_dir():
            remove_folder(left_over)
        else:
            left_over.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder with its files. Files that are open stay on Windows."""
    shutil.rmtree(folder, ignore_errors=True)


def sync_directory(folder: Path) -> None:
    """Make renames inside a folder durable. Windows cannot open directories and needs no sync."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _disk_is_full(path: Path, error: OSError, size_bytes: int | None) -> str:
    """Return the text of the error: the bytes to write, and those that are free."""
    text = f"the disk is full or a size limit was met ({error.strerror or error})"
    if size_bytes is not None:
        text += f" while {format_bytes(size_bytes)} were written"
    with suppress(OSError):
        free_bytes = shutil.disk_usage(nearest_folder(path.absolute().parent)).free
        text += f"; {format_bytes(free_bytes)} are free"
    return f"{text}; free space or write elsewhere"


def _advice(path: Path, error: OSError) -> str:
    """Return the text of an error: what happened and what to try."""
    what = error.strerror or str(error)
    if error.errno in _DENIED:
        return f"may not be written ({what}); check the permissions of {path.parent}"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST):
        return f"cannot be written ({what}); check that {path.parent} is a directory that exists"
    return f"cannot be written ({what}); check the disk or choose another one"
