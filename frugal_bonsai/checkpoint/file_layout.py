"""Lay out safetensors files before they are written.

In: names, dtypes and shapes of the tensors to write. Out: which tensor goes into which file, and
for each file its header and the byte range of every tensor. This module writes nothing and holds
one header.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from frugal_bonsai.checkpoint.folder import SINGLE_FILE
from frugal_bonsai.checkpoint.header import LENGTH_BYTES, METADATA_KEY
from frugal_bonsai.dtypes import DTYPE_BYTES

TensorSpec = tuple[str, str, tuple[int, ...]]
"""Name, safetensors name of the dtype, and shape of a tensor to write."""

TensorParts = Mapping[str, Sequence[tuple[str, tuple[int, ...]]]]
"""Tensor that is written in parts -> name and shape of each part, in the order of the data."""


def spec_bytes(spec: TensorSpec) -> int:
    """Return the number of data bytes of a tensor.

    Raises:
        ValueError: the format has no such dtype.
    """
    return _element_bytes(spec) * math.prod(spec[2])


def plan_shards(tensors: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Distribute tensors over shards in the given order.

    A tensor that does not fit into the current shard begins the next one. A tensor larger than the
    limit gets a shard to itself.

    Raises:
        ValueError: the limit is not positive, or the format lacks a dtype.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    shards: list[list[TensorSpec]] = [[]]
    filled_bytes = 0
    for spec in tensors:
        size_bytes = spec_bytes(spec)
        if shards[-1] and filled_bytes + size_bytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(spec)
        filled_bytes += size_bytes
    return shards


def shard_name(number: int, count: int) -> str:
    """Return transformers' file name for shard ``number`` (from 1) of ``count``."""
    return SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def build_header(
    tensors: Sequence[TensorSpec], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Build the length and the JSON header of one file.

    Tensors of the same element size keep the given order. Larger element sizes come first, as in
    the safetensors package, so that every tensor starts at a multiple of its element size.

    Args:
        tensors: the tensors of the file.
        metadata: text keys and values.

    Returns:
        The bytes before the data (their number is a multiple of 8), and the absolute (start, end)
        of each tensor in the order of the data.

    Raises:
        ValueError: a name is given twice or reserved, or the format lacks a dtype.
    """
    header: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    offset = 0
    ranges: dict[str, tuple[int, int]] = {}
    for spec in sorted(tensors, key=lambda spec: -_element_bytes(spec)):
        name, dtype, shape = spec
        if name in ranges or name == METADATA_KEY:
            raise ValueError(f"tensor name {name!r} is reserved or given twice")
        end = offset + spec_bytes(spec)
        ranges[name] = (offset, end)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    data_start = LENGTH_BYTES + len(text)
    absolute = {name: (data_start + a, data_start + b) for name, (a, b) in ranges.items()}
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, absolute


def _element_bytes(spec: TensorSpec) -> int:
    """Return the number of bytes of one element."""
    _, dtype, _ = spec
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]
