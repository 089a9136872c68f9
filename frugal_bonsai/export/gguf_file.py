"""A checkpoint as one GGUF file, which llama.cpp and what is built on it load.

In: an open checkpoint, its spec, a path. Out: the file, which appears when it is complete. The
``gguf`` package lays it out; this package says what goes in. Holds one tensor of the source and
what it becomes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal_bonsai.checkpoint.commit import (
    output_errors,
    partial_name,
    require_free_space,
    sync_directory,
)
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import CheckpointError, OptionError, OutputError
from frugal_bonsai.export.metadata import add_model, add_tokenizer
from frugal_bonsai.export.shape import Shape, describe_shape
from frugal_bonsai.export.tensors import DTYPES, GgufTensor, formats, list_tensors
from frugal_bonsai.export.tokenizer import read_tokenizer
from frugal_bonsai.export.values import Values
from frugal_bonsai.model.family import ModelSpec

if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True, kw_only=True)
class GgufSummary:
    """What was written.

    Attributes:
        architecture: llama.cpp's name.
        tokenizer: its kind, ``llama`` or ``gpt2``, and what splits text first.
        formats: how many tensors are stored in each number format.
        size_bytes: of the file.
    """

    architecture: str
    tokenizer: str
    formats: dict[str, int]
    size_bytes: int


def require_gguf() -> None:
    """Check that the ``gguf`` package is there.

    Raises:
        OptionError: it is not; the text says how to install it.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise OptionError(
            "GGUF files need the gguf package: pip install 'frugal-bonsai[gguf]'"
        ) from error


def write_gguf(
    checkpoint: Checkpoint, spec: ModelSpec, out: Path, *, name: str, dtype: str
) -> GgufSummary:
    """Write a model as a GGUF file.

    Args:
        checkpoint: dense or pruned; its folder holds the tokenizer.
        spec: its description.
        out: path of a file that does not exist.
        name: what the model is called in the file.
        dtype: number format of the matrices: ``f16``, ``f32`` or ``q8_0``.

    Raises:
        UnsupportedModelError: an architecture or tokenizer that llama.cpp has no equal for.
        CheckpointError: a tensor that cannot be read or stored in this format.
        OptionError: an unknown dtype, or no ``gguf`` package.
        OutputError: the file exists or cannot be written.
    """
    if dtype not in DTYPES:
        raise OptionError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    require_gguf()
    out = Path(out)
    _require_no_file(out)
    shape = describe_shape(spec, source=str(checkpoint.folder / "config.json"))
    tokenizer = read_tokenizer(checkpoint.folder, spec.vocabulary)
    tensors = list_tensors(checkpoint, spec, shape, dtype)
    require_free_space(out.parent, sum(tensor.size_bytes for tensor in tensors), "the GGUF file")
    from gguf import GGUFWriter

    with _committed(out) as temporary:
        writer = GGUFWriter(temporary, shape.architecture)
        try:
            add_model(writer, spec, shape, name, dtype)
            add_tokenizer(writer, tokenizer)
            _write_tensors(writer, checkpoint, shape, tensors)
        finally:
            writer.close()
    return GgufSummary(
        architecture=shape.architecture,
        tokenizer=f"{tokenizer.model} ({tokenizer.pre})",
        formats=formats(tensors),
        size_bytes=out.stat().st_size,
    )


def read_vocabulary(path: Path) -> int:
    """Tokens of a GGUF file.

    Raises:
        CheckpointError: it is no GGUF file.
    """
    require_gguf()
    from gguf import GGUFReader

    try:
        field = GGUFReader(path).get_field("tokenizer.ggml.tokens")
    except (OSError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: is no readable GGUF file ({error})") from error
    if field is None:
        raise CheckpointError(f"{path}: has no tokens (tokenizer.ggml.tokens)")
    return len(field.data)


def _require_no_file(out: Path) -> None:
    if out.is_dir():
        raise OutputError(f"{out}: is a folder; name a file, such as {out / 'model.gguf'}")
    if out.exists() or out.is_symlink():
        raise OutputError(f"{out}: exists; name another file, or remove it")


@contextmanager
def _committed(out: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``out`` when the block succeeds."""
    temporary = partial_name(out)
    try:
        with output_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            _require_no_file(out)
            temporary.rename(out)
            sync_directory(out.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _write_tensors(
    writer: GGUFWriter, checkpoint: Checkpoint, shape: Shape, tensors: list[GgufTensor]
) -> None:
    """Announce all tensors, then read, convert and write one at a time."""
    import gguf
    import numpy as np

    factors = {
        f"{key}.weight": np.asarray(values, dtype=np.float32)
        for key, values in (shape.rope.factors if shape.rope else {}).items()
    }
    for key, array in factors.items():
        writer.add_tensor_info(key, array.shape, array.dtype, array.nbytes)
    kinds: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "q8_0": np.uint8}
    for tensor in tensors:
        raw = gguf.GGMLQuantizationType.Q8_0 if tensor.dtype == "q8_0" else None
        writer.add_tensor_info(
            tensor.name,
            tensor.stored_shape,
            np.dtype(kinds[tensor.dtype]),
            tensor.size_bytes,
            raw,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array in factors.values():
        writer.write_tensor_data(array)
    for tensor in tensors:
        values: Any = Values(checkpoint, tensor)
        writer.write_tensor_data(values)
