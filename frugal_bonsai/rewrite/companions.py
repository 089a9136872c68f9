"""Copy the small files of a model: generation settings, tokenizer, processor of images.

In: the source's folder. Out: copies in the pruned model's folder. Config, weights and README are
not copied, because the layout, the rewriter and the model card replace them. Code is not copied
either (``*.py`` files that a tokenizer may name). Holds one file.
"""

from __future__ import annotations

from pathlib import Path

from frugal_bonsai.checkpoint.commit import output_errors, write_bytes
from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.plain_json import MAX_FILE_BYTES
from frugal_bonsai.sizes import format_bytes

COMPANIONS = (
    "generation_config.json",
    "tokenizer*.json",
    "*.model",  # SentencePiece
    "*.tiktoken",
    "vocab*.json",
    "vocab*.txt",
    "merges*.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)

# Settings of the processor that prepares images for a multimodal model.
PROCESSOR = ("processor_config.json", "*preprocessor_config.json")


def companions(source_folder: Path, *, processor: bool = False) -> list[Path]:
    """Return the files of a model's folder that match :data:`COMPANIONS`, sorted.

    Args:
        source_folder: the model's folder.
        processor: whether files that match :data:`PROCESSOR` are returned too.

    Raises:
        CheckpointError: a file is a link out of the folder, or larger than 256 MiB.
    """
    patterns = (*COMPANIONS, *(PROCESSOR if processor else ()))
    found = {path for pattern in patterns for path in source_folder.glob(pattern)}
    files = sorted(path for path in found if path.is_file())
    for path in files:
        _require_own(path, source_folder)
    return files


def _require_own(path: Path, source_folder: Path) -> None:
    """Check that a file can be copied into an output that may be published.

    A repository can hold a link to any file of the machine on which it is cloned.

    Raises:
        CheckpointError: the file is a link out of the model's folder (and not into the hub's
            cache), or larger than any file of a tokenizer.
    """
    folder, target = source_folder.resolve(), path.resolve()
    own = [folder]
    if folder.parent.name == "snapshots":  # the hub's cache: links to ../../blobs
        own.append((folder.parent.parent / "blobs").resolve())
    if not any(target.is_relative_to(place) for place in own):
        raise CheckpointError(
            f"{path}: is a link to {target}, outside of the model's folder, and would be copied "
            "into the output; if that is right, replace the link by a copy of the file"
        )
    size_bytes = target.stat().st_size
    if size_bytes > MAX_FILE_BYTES:
        raise CheckpointError(
            f"{path}: {format_bytes(size_bytes)}, more than any file of a tokenizer has "
            f"({format_bytes(MAX_FILE_BYTES)}); download it again, or remove it"
        )


def companion_bytes(source_folder: Path, *, processor: bool = False) -> int:
    """Return the bytes of these files."""
    return sum(path.stat().st_size for path in companions(source_folder, processor=processor))


def write_companions(
    source_folder: Path, folder: Path, *, processor: bool = False
) -> tuple[str, ...]:
    """Copy those of the files in :data:`COMPANIONS` that the source has.

    Args:
        source_folder: the dense model's folder. Links inside it, and those of the hub's cache, are
            followed.
        folder: an existing directory.
        processor: also copy the files in :data:`PROCESSOR`.

    Returns:
        Names of the copies relative to ``folder``, sorted.

    Raises:
        CheckpointError: a file cannot be read, or :func:`companions` refuses it.
        OutputError: a file cannot be written.
    """
    source_folder, folder = Path(source_folder), Path(folder)
    names = []
    for path in companions(source_folder, processor=processor):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror or error}); check its permissions"
            ) from error
        name = path.relative_to(source_folder)
        with output_errors(folder / name):
            (folder / name.parent).mkdir(exist_ok=True)
        write_bytes(folder / name, data)
        names.append(name.as_posix())
    return tuple(names)
