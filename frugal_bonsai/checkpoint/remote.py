"""Open a model for its config and headers only, for commands that describe or plan.

In: the name of a model: ``example``, a local folder, or a hub id. Out: a :class:`Checkpoint` with
the names, dtypes and shapes of all tensors. For a hub model outside the cache, only ``config.json``
and the headers are downloaded (a few hundred kilobytes for a 70B model), and reading a tensor
fails. Holds the headers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from frugal_bonsai.checkpoint.folder import CONFIG_FILE, read_json_object
from frugal_bonsai.checkpoint.header import TensorEntry
from frugal_bonsai.checkpoint.locate import hub_errors, local_model
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.recognise import ADAPTER_FILE, recognise_repository
from frugal_bonsai.checkpoint.recognised import require_recognised
from frugal_bonsai.errors import CheckpointError


def open_headers(model: str) -> Checkpoint:
    """Open a model for its config, names, dtypes and shapes.

    Args:
        model: ``example``, a local folder, or a hub id; no GGUF file.

    Raises:
        CheckpointError: there is no such model, the download failed, or a header is damaged.
    """
    folder = local_model(model)
    if folder is not None:
        return Checkpoint.open(folder)
    return _cached(model) or _fetched(model)


def _cached(model: str) -> Checkpoint | None:
    """Open a model in the hub's cache; return None if the cache lacks some of its files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with hub_errors(model):
            folder = snapshot_download(model, local_files_only=True)
        return Checkpoint.open(Path(folder))
    except CheckpointError as error:
        # An interrupted download leaves a folder without some files.
        if error.__cause__ is None or isinstance(error.__cause__, LocalEntryNotFoundError):
            return None
        raise


def _refuse_repository(model: str) -> NoReturn:
    """Raise for a repository without config or safetensors: an adapter, GGUF files, others."""
    from huggingface_hub import hf_hub_download, list_repo_files

    config: dict[str, Any] = {}
    names = list_repo_files(model)
    if ADAPTER_FILE in names:
        config = read_json_object(Path(hf_hub_download(model, ADAPTER_FILE)))
    require_recognised(model, recognise_repository(model, names, config))
    raise AssertionError(f"{model}: recognised as a model without a config")


def _fetched(model: str) -> Checkpoint:
    """Download the config and the headers from the hub."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        SafetensorsParsingError,
    )

    with hub_errors(model):
        try:
            config_path = Path(hf_hub_download(model, CONFIG_FILE))
        except LocalEntryNotFoundError:  # the hub cannot be reached
            raise
        except EntryNotFoundError:
            _refuse_repository(model)
        try:
            files = get_safetensors_metadata(model).files_metadata
        except NotASafetensorsRepoError:
            _refuse_repository(model)
        except SafetensorsParsingError as error:
            raise CheckpointError(
                f"MODEL {model!r} on the Hugging Face Hub: its safetensors are "
                f"damaged ({error}); use another revision or a copy"
            ) from error
    entries = [
        TensorEntry(
            name=name,
            dtype=info.dtype,
            shape=tuple(info.shape),
            file=config_path.parent / file,
            start=info.data_offsets[0],
            end=info.data_offsets[1],
        )
        for file, metadata in sorted(files.items())
        for name, info in metadata.tensors.items()
    ]
    tensors = {entry.name: entry for entry in entries}
    return Checkpoint(config_path.parent, read_json_object(config_path), tensors)
