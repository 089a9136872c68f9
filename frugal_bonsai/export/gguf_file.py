"""Write a checkpoint as one GGUF file, for llama.cpp and programs built on it.

In: an open checkpoint, its spec, a path. Out: the file, which appears when it is complete. The
``gguf`` package knows the format; this package supplies the contents. Holds the vocabulary, and of
the weights what :mod:`frugal_bonsai.export.gguf_tensor` holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from frugal_bonsai.checkpoint.commit import (
    output_errors,
    replaced_file,
    require_free_space,
    require_no_file,
)
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import OptionError, UnsupportedModelError
from frugal_bonsai.export.gguf_tensor import GgufTensor
from frugal_bonsai.export.shape import Shape, describe_shape, model_keys
from frugal_bonsai.export.tensors import DTYPES, list_tensors
from frugal_bonsai.export.tokenizer import end_note, read_tokenizer
from frugal_bonsai.model.family import ModelSpec


@dataclass(frozen=True, kw_only=True)
class GgufSummary:
    """Facts about a written file.

    Attributes:
        architecture: llama.cpp's name.
        tokenizer: Its kind, ``llama`` or ``gpt2``, and the rule that splits a text before BPE.
        formats: Number of tensors in each number format.
        fallbacks: Names of the tensors that are f16 because their rows do not divide into blocks.
        size_bytes: Size of the file.
        notes: What the user should know.
    """

    architecture: str
    tokenizer: str
    formats: dict[str, int]
    fallbacks: list[str]
    size_bytes: int
    notes: list[str]


def write_gguf(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    out: Path,
    *,
    name: str,
    dtype: str,
    replaces: bytes = b"",
) -> GgufSummary:
    """Write a model as a GGUF file.

    Args:
        checkpoint: A dense or pruned model; its folder holds the tokenizer.
        spec: Its description.
        out: Path of the file.
        name: Name of the model in the file.
        dtype: Number format of the matrices, one of ``DTYPES``.
        replaces: A file that begins with these bytes may be replaced; empty for none.

    Raises:
        UnsupportedModelError: llama.cpp lacks the architecture or the tokenizer.
        CheckpointError: A tensor or the tokenizer cannot be read, or the number format cannot hold
            a value.
        OptionError: The dtype is unknown.
        OutputError: The file exists or cannot be written.
    """
    out = Path(out)
    require_no_file(out, "model.gguf", replaces=replaces)
    planned = plan_gguf(checkpoint, spec, dtype=dtype)
    shape, tokenizer, tensors = planned.shape, planned.tokenizer, planned.tensors
    require_free_space(out.parent, planned.size_bytes, "the GGUF file")
    with output_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(out) as file:
        with closing(gguf.GGUFWriter(Path(file.name), shape.architecture)) as writer:
            keys = model_keys(spec, shape, name, dtype) | tokenizer
            for method, value in keys.items():
                getattr(writer, method)(value)
            _write_tensors(writer, shape.factors, tensors)
        require_no_file(out, "model.gguf", replaces=replaces)
    return planned.describe(out.stat().st_size)


@dataclass(frozen=True, kw_only=True)
class GgufPlan:
    """Contents of a file that is not written yet.

    Attributes:
        shape: llama.cpp's architecture with its figures.
        tokenizer: Methods of the writer with the values that describe the tokenizer.
        tensors: Tensors of the file, in order.
        dtype: Number format of the matrices.
    """

    shape: Shape
    tokenizer: dict[str, Any]
    tensors: list[GgufTensor]
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Bytes of tensors and vocabulary, nearly all of the file."""
        return sum(tensor.nbytes for tensor in self.tensors) + _vocabulary_bytes(self.tokenizer)

    def describe(self, size_bytes: int) -> GgufSummary:
        """Return the facts about the file."""
        tokenizer, tensors = self.tokenizer, self.tensors
        return GgufSummary(
            architecture=self.shape.architecture,
            tokenizer=f"{tokenizer['add_tokenizer_model']} ({tokenizer['add_tokenizer_pre']})",
            formats=dict(Counter(tensor.kind.name.lower() for tensor in tensors)),
            fallbacks=[t.name for t in tensors if t.kind.name == "F16" and self.dtype != "f16"],
            size_bytes=size_bytes,
            notes=end_note(tokenizer),
        )


def plan_gguf(checkpoint: Checkpoint, spec: ModelSpec, *, dtype: str) -> GgufPlan:
    """Plan a model's GGUF file; the arguments and errors are those of :func:`write_gguf`."""
    if dtype not in DTYPES:
        raise OptionError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    with _errors_about(checkpoint.config_file):
        shape = describe_shape(spec)
    with _errors_about(checkpoint.folder):
        tokenizer = read_tokenizer(checkpoint.companions, spec.vocabulary, spec.config)
    tensors = list_tensors(checkpoint, spec, shape, dtype)
    return GgufPlan(shape=shape, tokenizer=tokenizer, tensors=tensors, dtype=dtype)


def _vocabulary_bytes(tokenizer: Mapping[str, Any]) -> int:
    """Return the bytes of the vocabulary's lists: texts with their lengths, numbers of 4 bytes."""
    lists = (value for value in tokenizer.values() if isinstance(value, list))
    return sum(
        8 + len(entry.encode("utf-8", "surrogatepass")) if isinstance(entry, str) else 4
        for values in lists
        for entry in values
    )


@contextmanager
def _errors_about(path: Path) -> Iterator[None]:
    """Put a path in front of the block's errors about what llama.cpp lacks."""
    try:
        yield
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error


def _write_tensors(
    writer: gguf.GGUFWriter, factors: dict[str, tuple[float, ...]], tensors: list[GgufTensor]
) -> None:
    """Write the header with all names, then the tensors, one at a time."""
    real = np.dtype(np.float32)
    arrays = {f"{name}.weight": np.asarray(values, real) for name, values in factors.items()}
    for name, array in arrays.items():
        writer.add_tensor_info(name, array.shape, real, array.nbytes)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, real, tensor.nbytes, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for data in (*arrays.values(), *tensors):
        writer.write_tensor_data(data)
