"""Find the folder or the GGUF file of the model that the user names.

In: ``example``, a local folder or GGUF file, or a hub id. Out: its path. A hub model is downloaded
into huggingface_hub's cache, restricted to the files that pruning needs (safetensors, JSON,
tokenizer) and the card. Opens no weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from frugal_bonsai.checkpoint.recognise import recognise_file, recognise_folder
from frugal_bonsai.checkpoint.recognise_gguf import GGUF_SUFFIX
from frugal_bonsai.checkpoint.recognised import require_recognised
from frugal_bonsai.errors import CheckpointError

EXAMPLE = "example"
# Only files at the top of the repository: folders hold other formats of the same weights.
HUB_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "README.md")
HUB_LEFT_OUT = ("*/*", "consolidated*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def find_model(model: str) -> Path:
    """Return the folder or the GGUF file of a model, after downloading it if need be.

    Args:
        model: ``example`` (the embedded model), an existing local folder or GGUF file, or a hub id
            ``org/name``. Write ``./`` before a local folder that is named ``example``.

    Raises:
        CheckpointError: there is no such model, the name is another file's, or the download failed.
            The text says what was tried.
    """
    path = local_model(model)
    return _download(model) if path is None else path


def local_model(model: str) -> Path | None:
    """Return the path of a local model, or None if the name can be a hub id.

    Returns:
        A folder, or a GGUF file: also for a folder whose only weights are one GGUF file.

    Raises:
        CheckpointError: the name is that of a file of another kind, or neither a path nor a
            possible hub id.
    """
    if model == EXAMPLE:
        return _example_folder()
    try:
        path = Path(model).expanduser()
        exists, is_folder = bool(model) and path.exists(), bool(model) and path.is_dir()
    except (OSError, RuntimeError):  # the system refuses, or there is no home folder to expand
        path, exists, is_folder = Path(model), False, False
    if is_folder:
        file = recognise_folder(path).details.get("gguf")
        return path if file is None else path / file
    if exists:
        require_recognised(f"MODEL {model!r}", recognise_file(path))
        return path
    if model.endswith(GGUF_SUFFIX):
        raise CheckpointError(
            f"MODEL {model!r}: there is no such file (looked for {path.absolute()}); check the path"
        )
    if _HUB_ID.fullmatch(model):
        return None
    raise CheckpointError(
        f"MODEL {model!r} is neither a local folder (looked for {path.absolute()}) nor a hub id of "
        f"the form org/name, nor {EXAMPLE!r}; check the spelling"
    )


def _example_folder() -> Path:
    """Return the folder of the embedded model."""
    folder = Path(__file__).resolve().parent.parent / "example"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: the embedded example model is not in this installation; reinstall "
            "frugal-bonsai"
        )
    return folder


def _download(model: str) -> Path:
    """Return the folder of a hub repository's files, from the cache or the network."""
    from huggingface_hub import snapshot_download

    with hub_errors(model):
        folder = snapshot_download(
            model, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_LEFT_OUT)
        )
    return Path(folder)


@contextmanager
def hub_errors(model: str) -> Iterator[None]:
    """Turn errors of the hub and of the connection into a :class:`CheckpointError`."""
    from huggingface_hub.errors import HfHubHTTPError

    # Connection errors are raised as the transport's own class (requests, httpx), which is a base
    # class of the hub's error.
    transport = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    expected: tuple[type[Exception], ...] = (OSError, ValueError, *transport)
    try:
        yield
    except expected as error:
        raise CheckpointError(_download_failed(model, error)) from error


def _download_failed(model: str, error: Exception) -> str:
    """Return the error text of a failed download: what was tried and what to do."""
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
        f"{tried}: the download failed ({type(error).__name__}: {_first_line(error)}); try again "
        "(files that have arrived are kept), and check the connection and the free disk space"
    )


def _first_line(error: Exception) -> str:
    """Return the first line of an error's text, cut to a readable length."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no details"
