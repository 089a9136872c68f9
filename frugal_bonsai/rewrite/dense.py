"""Write a checkpoint unchanged as a folder that plain transformers loads.

In: a checkpoint, such as an open GGUF file. Out: ``config.json``, safetensors weights and the small
files in a folder. Holds a few megabytes of a tensor.
"""

from __future__ import annotations

from pathlib import Path

from frugal_bonsai.checkpoint.commit import write_json
from frugal_bonsai.checkpoint.folder import CONFIG_FILE
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.writer import ShardedWriter
from frugal_bonsai.rewrite.companions import write_companions
from frugal_bonsai.rewrite.cut_stream import TensorCut, stream_cuts

_SHARD_BYTES = 5 * 10**9


def write_dense(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a checkpoint into an existing folder, under the names of its files.

    Raises:
        CheckpointError: a tensor or a small file cannot be read.
        OutputError: a file cannot be written.
    """
    entries = checkpoint.tensors
    specs = [(entry.name, entry.dtype, entry.stored_shape) for entry in entries.values()]
    with ShardedWriter(folder, specs, max_shard_bytes=_SHARD_BYTES) as writer:
        for name, rows in stream_cuts(checkpoint, [TensorCut(name, {}) for name in entries]):
            writer.append(entries[name].name, rows)
        writer.finish()
    write_companions(checkpoint.companions, folder)
    write_json(folder / CONFIG_FILE, checkpoint.config)
