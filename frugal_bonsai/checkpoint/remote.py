"""A model's config and headers, without its weights: for commands that only describe or plan.

In: what the user typed as MODEL. Out: a :class:`Checkpoint` whose tensors have names, dtypes and
shapes. Of a hub model that is not in the cache only ``config.json`` and the headers are fetched, a
few hundred kilobytes for a 70B; reading a tensor of it fails. Holds the headers.
"""

from __future__ import annotations

from pathlib import Path

from frugal_bonsai.checkpoint.folder import CONFIG_FILE, read_json_object
from frugal_bonsai.checkpoint.header import TensorEntry
from frugal_bonsai.checkpoint.locate import hub_errors, local_folder
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import CheckpointError


def open_headers(model: str) -> Checkpoint:
    """Open a model for its config, names, dtypes and shapes.

    Args:
        model: ``example``, a local folder, or a hub id.

    Raises:
        CheckpointError: nothing of that name, a failed download, or a damaged header.
    """
    folder = local_folder(model)
    if folder is not None:
        return Checkpoint.open(folder)
    return _cached(model) or _fetched(model)


def _cached(model: str) -> Checkpoint | None:
    """The model in the hub's cache; None where it, or a part of it, is missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with hub_errors(model):
            folder = snapshot_download(model, local_files_only=True)
        return Checkpoint.open(Path(folder))
    except CheckpointError as error:
        # A download that was stopped half-way leaves a folder like any other.
        if error.__cause__ is None or isinstance(error.__cause__, LocalEntryNotFoundError):
            return None
        raise


def _fetched(model: str) -> Checkpoint:
    """The config and the headers from the hub."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    with hub_errors(model):
        config_path = Path(hf_hub_download(model, CONFIG_FILE))
        try:
            files = get_safetensors_metadata(model).files_metadata
        except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
            raise CheckpointError(
                f"MODEL {model!r} on the Hugging Face Hub: its weights are no safetensors, or "
                f"damaged ({error}); download them, and convert them with save_pretrained"
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
