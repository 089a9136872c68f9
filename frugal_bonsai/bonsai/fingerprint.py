"""Short hashes that tell whether a run still has the inputs that it began with.

In: bytes, or a checkpoint's config and headers. Out: text. Reads no weights.
"""

from __future__ import annotations

import hashlib
import json

from frugal_bonsai.checkpoint.reader import Checkpoint


def fingerprint(*parts: bytes) -> str:
    """Return a short hash of these bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """Return a hash of a checkpoint's config and headers, not of its weights."""
    entries = sorted(
        (name, entry.gguf_kind or entry.dtype, entry.shape, entry.start)
        for name, entry in checkpoint.tensors.items()
    )
    return fingerprint(
        json.dumps(checkpoint.config, sort_keys=True).encode(), repr(entries).encode()
    )
