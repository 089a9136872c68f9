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
from frugal_bonsai.export.architecture import Shape, describe_shape
from frugal_bonsai.export.tensors import DTYPES, GgufTensor, formats, list_tensors, read_tensor
from frugal_bonsai.export.tokenizer import GgufTokenizer, read_tokenizer
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
            _add_model(writer, spec, shape, name, dtype)
            _add_tokenizer(writer, tokenizer)
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


def _add_model(writer: GGUFWriter, spec: ModelSpec, shape: Shape, name: str, dtype: str) -> None:
    """The hyperparameters, under the keys that llama.cpp reads for this architecture."""
    import gguf

    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(int(gguf.LlamaFileType[kinds[dtype]]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(spec.positions)
    writer.add_embedding_length(spec.hidden)
    writer.add_block_count(spec.layers)
    writer.add_vocab_size(spec.vocabulary)
    # Arrays where layers differ: deci takes them, and takes nothing else.
    one = shape.uniform
    writer.add_head_count(shape.heads[0] if one else list(shape.heads))
    writer.add_head_count_kv(shape.kv_heads[0] if one else list(shape.kv_heads))
    writer.add_feed_forward_length(shape.channels[0] if one else list(shape.channels))
    # The default, embedding_length / head_count, is wrong for a pruned model.
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)


def _add_tokenizer(writer: GGUFWriter, tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    if tokenizer.scores is not None:
        writer.add_token_scores(tokenizer.scores)
    if tokenizer.merges is not None:
        writer.add_token_merges(tokenizer.merges)
    add_id = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for kind, at in tokenizer.special_ids.items():
        add_id[kind](at)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(tokenizer.add_eos)
    writer.add_add_space_prefix(tokenizer.add_space_prefix)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _write_tensors(
    writer: GGUFWriter, checkpoint: Checkpoint, shape: Shape, tensors: list[GgufTensor]
) -> None:
    """Announce all tensors, then read, convert and write one at a time."""
    import gguf
    import numpy as np

    factors: Any = None
    if shape.rope_factors is not None:
        factors = np.asarray(shape.rope_factors, dtype=np.float32)
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
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
    if factors is not None:
        writer.write_tensor_data(factors)
    for tensor in tensors:
        writer.write_tensor_data(read_tensor(checkpoint, tensor))
