"""The output of a command: checked before any work, replaced only if the user asks for it.

In: paths and the models that are read. Out: nothing, or an error. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from frugal_bonsai.checkpoint.commit import require_no_file, require_no_output, require_writable
from frugal_bonsai.checkpoint.locate import local_model
from frugal_bonsai.errors import OutputError
from frugal_bonsai.run.provenance import ADAPT_REPORT_FILE, MASK_FILE, REPORT_FILE
from frugal_bonsai.run.run_folder import require_unlocked, run_folder

_PAPERS = (MASK_FILE, REPORT_FILE, ADAPT_REPORT_FILE)
_GGUF_START = b"GGUF"


def replaceable(overwrite: bool) -> tuple[str, ...]:
    """Return names of files of which one is in every folder that ``--overwrite`` may replace."""
    return _PAPERS if overwrite else ()


def replaceable_file(overwrite: bool) -> bytes:
    """Return the first bytes of every file that ``--overwrite`` may replace."""
    return _GGUF_START if overwrite else b""


def require_output_folder(out: Path, *models: str | None, overwrite: bool) -> None:
    """Check that a command can write its output folder.

    Args:
        out: The folder.
        models: Models that the command reads, as the user names them.
        overwrite: A folder that this program wrote may be replaced.

    Raises:
        OutputError: Something else is there, or nothing can be written.
        StateError: Another run is working there.
    """
    _require_name(out, "pruned")
    _require_not_read(out, *models)
    require_no_output(out, replaces=replaceable(overwrite))
    require_writable(out)
    require_unlocked(run_folder(out))


def require_output_file(out: Path, model: str, *, overwrite: bool) -> None:
    """Check that ``export`` can write its file, as :func:`require_output_folder` does."""
    _require_name(out, "model.gguf")
    _require_not_read(out, model)
    require_no_file(out, "model.gguf", replaces=replaceable_file(overwrite))
    require_writable(out)
    require_unlocked(run_folder(out))


def _require_name(out: Path, example: str) -> None:
    """Raise unless a path ends in a name, which an output gets by a rename when it is complete."""
    if out.name in ("", ".."):
        raise OutputError(
            f"--out {out}: ends in no name; the output appears under a new name when it is "
            f"complete, so name one, such as {Path(out, example)}"
        )


def _require_not_read(out: Path, *models: str | None) -> None:
    """Raise if the output is a model that is read, or a folder around one."""
    for name in models:
        path = None if name is None or not Path(name).exists() else local_model(name)
        if path is not None and out.resolve() in (path.resolve(), *path.resolve().parents):
            raise OutputError(f"--out {out}: holds {name}, which is read; choose another")
