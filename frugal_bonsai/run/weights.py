"""The layers that a command streams: the checkpoint's, or those of a quantised working copy.

In: an engine. Out: a stream of its model's layers. A working copy lies in a temporary folder while
the stream is open. Holds the stream's buffers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.layers import LayerStream
from frugal_bonsai.stream.store import build_store


@contextmanager
def open_layers(engine: Engine, weights: str | None) -> Iterator[LayerStream]:
    """Stream the layers of the checkpoint, or of a working copy that exists meanwhile."""
    if weights is None:
        with engine.native() as stream:
            yield stream
        return
    with tempfile.TemporaryDirectory(prefix="frugal-bonsai-") as folder:
        store = build_store(
            Path(folder),
            engine.checkpoint,
            engine.spec,
            weights=weights,
            device=engine.device,
            progress=engine.progress,
        )
        with engine.stream(store) as stream:
            yield stream
