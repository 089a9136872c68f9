"""Copy the small files of a model: generation settings, tokenizer, processor of images.

In: the source's folder. Out: copies in the pruned model's folder. Config, weights and README are
not copied, because the layout, the rewriter and the model card replace them. Code is not copied
either (``*.py`` files that a tokenizer may name). Holds one file.
"""

from __future__ import annotations

from pathlib import Path

from frugal_bonsai.checkpoint.commit import output_errors, write_bytes
from frugal_bonsai.errors import CheckpointError

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
    """
    patterns = (*COMPANIONS, *(PROCESSOR if processor else ()))
    found = {path for pattern in patterns for path in source_folder.glob(pattern)}
    return sorted(path for path in found if path.is_file())


def companion_bytes(source_folder: Path, *, processor: bool = False) -> int:
    """Return the bytes of these files."""
    return sum(path.stat().st_size for path in companions(source_folder, processor=processor))


def write_companions(
    source_folder: Path, folder: Path, *, processor: bool = False
) -> tuple[str, ...]:
    """Copy those of the files in :data:`COMPANIONS` that the source has.

    Args:
        source_folder: the dense model's folder. Links are followed, as in the hub's cache.
        folder: an existing directory.
        processor: also copy the files in :data:`PROCESSOR`.

    Returns:
        Names of the copies relative to ``folder``, sorted.

    Raises:
        CheckpointError: a file cannot be read.
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
