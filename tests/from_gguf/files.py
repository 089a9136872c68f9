"""GGUF files in any number format, made from an exported one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from export.test_llama_cpp import export
from export.test_llama_cpp_families import FULL
from tiny_models import save_pair_tokenizer, tiny_family

# Rows of 256 values, the block of K-quants.
WIDE: dict[str, Any] = {
    **FULL,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}


def exported(folder: Path, family: str = "llama", dtype: str = "f32", **changes: Any) -> Path:
    """Export a tiny model with a tokenizer; return the GGUF file beside its folder."""
    tiny_family(folder, family, **{**FULL, **changes})
    save_pair_tokenizer(folder)
    path = folder.with_suffix(".gguf")
    export(folder, path, dtype)
    return path


def rewritten(
    source: Path,
    out: Path,
    *,
    kinds: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    drop: tuple[str, ...] = (),
) -> Path:
    """Write a GGUF file again, with tensors of other number formats and other metadata.

    Args:
        source: the file.
        out: the new file.
        kinds: part of a matrix's name -> number format. The values of K-quants are random.
        metadata: keys and values that replace or join the source's.
        drop: keys and tensors that are left out.
    """
    reader = gguf.GGUFReader(source)
    said = {name: field.contents() for name, field in reader.fields.items()}
    said = {name: value for name, value in said.items() if not name.startswith("GGUF.")}
    said |= metadata or {}
    writer = gguf.GGUFWriter(out, said.pop("general.architecture"))
    for name, value in said.items():
        if name not in drop:
            add_value(writer, reader, name, value)
    for tensor in reader.tensors:
        if tensor.name in drop:
            continue
        matrix = len(tensor.shape) > 1
        found = [kind for part, kind in (kinds or {}).items() if matrix and part in tensor.name]
        kind = gguf.GGMLQuantizationType[found[0] if found else "F32"]
        values = tensor.data.reshape(tensor.shape[::-1])
        writer.add_tensor(tensor.name, quantised(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def quantised(values: np.ndarray[Any, Any], kind: Any) -> np.ndarray[Any, Any]:
    """Quantise values; where the package cannot, return random blocks with finite scales."""
    try:
        return gguf.quantize(values.astype(np.float32), kind)
    except NotImplementedError:
        shape = gguf.quant_shape_to_byte_shape(values.shape, kind)
        random = np.random.default_rng(sum(shape))
        return random.integers(0, 0x3C, shape, dtype=np.uint8)  # fp16 below 1


def add_value(writer: Any, reader: Any, name: str, value: Any) -> None:
    """Add a key with the type that it has in a file, or that Python's type suggests."""
    types = reader.fields[name].types if name in reader.fields else []
    if isinstance(value, list):
        types = [gguf.GGUFValueType.ARRAY]
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    kind = types[0] if types else gguf.GGUFValueType[kinds[type(value)]]
    if kind == gguf.GGUFValueType.ARRAY:
        writer.add_array(name, value)
    else:
        writer.add_key_value(name, value, kind)
