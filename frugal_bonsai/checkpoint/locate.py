"""From what the user typed as MODEL to a folder on disk.

In: ``example``, a local folder, or a hub id. Out: the folder. Downloads only what pruning needs
(safetensors, JSON, tokenizer) into huggingface_hub's cache; opens no weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from frugal_bonsai.errors import CheckpointError

EXAMPLE = "example"
# Files at the top of the repository alone: what lies deeper is other formats of the same weights.
HUB_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")
HUB_LEFT_OUT = ("*/*", "consolidated*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def find_model(model: str) -> Path:
    """The folder of a model.

    Args:
        model: ``example`` (the embedded model), an existing local folder, or a hub id
            ``org/name``, which is downloaded unless it is cached. A folder named like one of the
            others is written with ``./`` in front.

    Raises:
        CheckpointError: nothing of that name, a file, or a failed download; the text says what was
            tried.
    """
    folder = local_folder(model)
    return _download(model) if folder is None else folder


def local_folder(model: str) -> Path | None:
    """The folder of a model that is here; None for what has the form of a hub id.

    Raises:
        CheckpointError: a file, or neither a folder nor an id.
    """
    if model == EXAMPLE:
        return _example_folder()
    try:
        path = Path(model).expanduser()
        exists, is_folder = bool(model) and path.exists(), bool(model) and path.is_dir()
    except (OSError, RuntimeError):  # refused by the system, or no home folder to expand
        path, exists, is_folder = Path(model), False, False
    if is_folder:
        return path
    if exists:
        raise CheckpointError(
            f"MODEL {model!r} is a file; name the folder that holds config.json and the weights "
            f"({path.parent})"
        )
    if _HUB_ID.fullmatch(model):
        return None
    raise CheckpointError(
        f"MODEL {model!r} is neither a local folder (looked for {path.absolute()}) nor a hub id of "
        f"the form org/name, nor {EXAMPLE!r}; check the spelling"
    )


def _example_folder() -> Path:
    """The folder of the embedded model."""
    folder = Path(__file__).resolve().parent.parent / "example"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: the embedded example model is not in this installation; install "
            "frugal-bonsai again"
        )
    return folder


def _download(model: str) -> Path:
    """A hub repository's files, from the cache or the network."""
    from huggingface_hub import snapshot_download

    with hub_errors(model):
        folder = snapshot_download(
            model, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_LEFT_OUT)
        )
    return Path(folder)


@contextmanager
def hub_errors(model: str) -> Iterator[None]:
    """Turn what the hub and the connection raise into a :class:`CheckpointError`."""
    from huggingface_hub.errors import HfHubHTTPError

    # The transport's own error (requests, httpx) is a base of the hub's: errors of the connection
    # reach us as that class.
    transport = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    expected: tuple[type[Exception], ...] = (OSError, ValueError, *transport)
    try:
        yield
    except expected as error:
        raise CheckpointError(_download_failed(model, error)) from error


def _download_failed(model: str, error: Exception) -> str:
    """What was tried and what to do, by the kind of failure."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    tried = f"MODEL {model!r} is no local folder, so it was looked up on the Hugging Face Hub"
    if isinstance(error, GatedRepoError):
        return f"{tried}: access is gated; accept its terms on its page, then run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{tried}: no such repository, or it is private; check the spelling, or run "
            "`hf auth login`"
        )
    if isinstance(error, HFValidationError):
        return f"{tried}: this is no valid id ({_first_line(error)}); check the spelling"
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"{tried}: the hub cannot be reached and the model is not in the cache; check the "
            "connection (and HF_HUB_OFFLINE), or copy the model here and name its folder"
        )
    return (
        f"{tried}: the download failed ({type(error).__name__}: {_first_line(error)}); try again, "
        "what has arrived is kept; check the connection and the free disk space"
    )


def _first_line(error: Exception) -> str:
    """The first line of an error's text, cut to a readable length."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no details"
