"""Say what a GGUF file is: number formats, size, and what its metadata say of its origin.

In: an open :class:`GgufCheckpoint`. Out: plain values and texts. Reads no files.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.gguf_reader import GgufCheckpoint
from frugal_bonsai.checkpoint.reader import Checkpoint


def gguf_facts(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return name, architecture, number formats and size of a GGUF file as plain values.

    Returns:
        None for a checkpoint that is no GGUF file; otherwise
        ``file``; ``name`` and ``architecture`` of the metadata; ``quantisation``: llama.cpp's name
        of the mixture, or the format of most values; ``quantised``: whether any weight is;
        ``dtype``: that in which weights are read; ``formats``: values in each number format;
        ``file_bytes``: of all parts.
    """
    if not isinstance(checkpoint, GgufCheckpoint):
        return None
    import gguf

    metadata, formats = checkpoint.header.metadata, _formats(checkpoint)
    try:
        mixture = gguf.LlamaFileType(metadata.get("general.file_type")).name
        quantisation = mixture.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        quantisation = max(formats, key=lambda kind: formats[kind])
    files = {entry.file for entry in checkpoint.tensors.values()}
    return {
        "file": checkpoint.header.path.name,
        "name": metadata.get("general.name"),
        "architecture": metadata["general.architecture"],
        "quantisation": quantisation,
        "quantised": bool(formats.keys() - {"F32", "F16", "BF16"}),
        "dtype": checkpoint.config["dtype"],
        "formats": formats,
        "file_bytes": sum(Path(file).stat().st_size for file in files),
    }


def gguf_note(checkpoint: GgufCheckpoint) -> str:
    """Return what a user should know about the weights of a GGUF file."""
    facts = gguf_facts(checkpoint)
    assert facts is not None
    if not facts["quantised"]:
        return f"{facts['file']} is a GGUF file: its weights are read as {facts['dtype']}"
    return (
        f"{facts['file']} is a GGUF file ({facts['quantisation']}): its weights are dequantised to "
        f"{facts['dtype']}, and what quantisation took from them stays lost; the original "
        "checkpoint gives better results if you can get it"
    )


def _formats(checkpoint: GgufCheckpoint) -> dict[str, int]:
    """Return the number of values in each number format, the most frequent first."""
    values: Counter[str] = Counter()
    for entry in checkpoint.tensors.values():
        values[str(entry.gguf_kind)] += math.prod(entry.shape)
    return dict(values.most_common())
