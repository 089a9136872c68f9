"""Find the config and the tensors of a checkpoint folder.

In: a folder. Out: ``config.json`` as a dict, and one :class:`TensorEntry` per tensor from
``model.safetensors`` or from ``model.safetensors.index.json`` and its shards. If a folder has both,
the single file is read, as in transformers. Reads headers and JSON only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from frugal_bonsai.checkpoint.header import DOWNLOAD_AGAIN, TensorEntry, read_header
from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.plain_json import read_json

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
SAVE_AGAIN = "download the index again or save the model again with save_pretrained"


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a checkpoint folder.

    Raises:
        CheckpointError: the folder or the config is missing, or the config is no JSON object.
    """
    try:
        exists, is_folder = folder.exists(), folder.is_dir()
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be opened ({error.strerror or error}); check the path and its "
            "permissions"
        ) from error
    if not exists:
        raise CheckpointError(f"{folder}: no such folder; check the path")
    if not is_folder:
        raise CheckpointError(
            f"{folder}: is a file, expected the folder that holds {CONFIG_FILE} and the weights; "
            f"try {folder.parent}"
        )
    path = folder / CONFIG_FILE
    if not _is_file(path):
        raise CheckpointError(
            f"{folder}: has no {CONFIG_FILE}, so the architecture is unknown; copy it from the "
            "model's source"
        )
    return read_json_object(path)


def find_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Return every tensor of the checkpoint, shard by shard, in the order of the data.

    Raises:
        CheckpointError: the folder has no safetensors weights, or the index or a file is damaged.
    """
    if _is_file(folder / SINGLE_FILE):
        return read_header(folder / SINGLE_FILE)[0]
    if not _is_file(folder / INDEX_FILE):
        raise CheckpointError(_no_weights(folder))
    weight_map = _read_index(folder / INDEX_FILE)
    tensors: dict[str, TensorEntry] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if not _is_file(folder / shard):
            raise CheckpointError(
                f"{folder / shard}: shard is missing ({INDEX_FILE} names it for "
                f"{sum(1 for file in weight_map.values() if file == shard)} tensors); download it"
            )
        for name, entry in read_header(folder / shard)[0].items():
            _check_against_index(folder, entry, shard, weight_map, tensors.get(name))
            tensors[name] = entry
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{folder / shard}: tensor {name!r} is not in this file, though {INDEX_FILE} "
                f"lists it there; {DOWNLOAD_AGAIN}"
            )
    return tensors


def missing_shards(folder: Path) -> list[str]:
    """Return the names of the shards that the index lists and the folder lacks.

    Raises:
        CheckpointError: the index is damaged.
    """
    shards = dict.fromkeys(_read_index(folder / INDEX_FILE).values())
    return [shard for shard in shards if not _is_file(folder / shard)]


def convert_pickles(folder: Path) -> str:
    """Return how pickled weights are converted, as the end of a sentence."""
    return (
        "convert them once, if you trust them, with\n"
        '  python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"a, b = {str(folder)!r}, {str(folder) + '-safetensors'!r}; "
        "M.from_pretrained(a, dtype='auto').save_pretrained(b); "
        'T.from_pretrained(a).save_pretrained(b)"'
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: the file cannot be read, is not UTF-8, not JSON, or holds no object.
    """
    try:
        value = read_json(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise CheckpointError(f"{path}: is not JSON ({error}); {DOWNLOAD_AGAIN}") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, found {type(value).__name__}; {DOWNLOAD_AGAIN}"
        )
    return value


def _read_index(path: Path) -> dict[str, str]:
    """Return tensor name -> file name of its shard, and check that each is inside the folder."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map (tensor name -> shard); {SAVE_AGAIN}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or not shard.isprintable():
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected the name of a shard, found {shard!r}; "
                f"{SAVE_AGAIN}"
            )
        if not _is_inside(shard):
            raise CheckpointError(
                f"{path}: tensor {name!r}: names {shard!r}, which is outside the folder: refused; "
                f"if you trust this checkpoint, {SAVE_AGAIN}"
            )
    return weight_map


def _is_inside(shard: str) -> bool:
    """Return whether a shard's name is a relative path without ``..`` on every platform.

    Only the text is checked. The file may be a symbolic link, as in the hub's cache.
    """
    windows = PureWindowsPath(shard)
    if windows.drive or windows.root or PurePosixPath(shard).is_absolute():
        return False
    return ".." not in windows.parts  # split at both kinds of slash


def _is_file(path: Path) -> bool:
    """Return whether a file exists; False if the system raises, as for names that are too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def _check_against_index(
    folder: Path,
    entry: TensorEntry,
    shard: str,
    weight_map: Mapping[str, str],
    earlier: TensorEntry | None,
) -> None:
    """Check that a tensor is in one shard, the one that the index names.

    Differs from transformers, which loads everything that the shards hold. A weight that the index
    does not list points to a damaged index or to a leftover file; either would change the model
    silently.
    """
    if earlier is not None or weight_map.get(entry.name, shard) != shard:
        other = earlier.file.name if earlier is not None else weight_map[entry.name]
        raise CheckpointError(
            f"{folder / shard}: tensor {entry.name!r} is also in {other} ({INDEX_FILE} says "
            f"{weight_map.get(entry.name)}); only one copy can be right: {SAVE_AGAIN}"
        )
    if entry.name not in weight_map:
        raise CheckpointError(
            f"{folder / shard}: tensor {entry.name!r} is not in {INDEX_FILE}; {SAVE_AGAIN}"
        )


def _no_weights(folder: Path) -> str:
    """Return the error text for a folder without safetensors weights."""
    found = sorted(path.name for path in folder.iterdir() if _is_file(path))
    pickles = [name for name in found if name.endswith(PICKLE_SUFFIXES)]
    others = [name for name in found if name.endswith(".safetensors")]
    expected = f"expected {SINGLE_FILE} or {INDEX_FILE}"
    if others:
        return (
            f"{folder}: {expected}, found {', '.join(others)}; rename a single file to "
            f"{SINGLE_FILE}, or add the index of the shards"
        )
    if pickles:
        return (
            f"{folder}: has only pickled weights ({', '.join(pickles)}), which can run code when "
            f"they are opened; {convert_pickles(folder)}"
        )
    return f"{folder}: has no weights, {expected}; download the model again"
