"""One model on one device under one plan: the objects that all sweeps of a run share.

In: an open checkpoint, its description, device, compute dtype, the arithmetic of masked evaluation
and the plan's limits. Out: streams, heads, the sweep. Memory: the skeleton (final norm, rotary
embeddings) and, where it fits in one chunk, the head.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch

from frugal_bonsai.accelerator import is_accelerator
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.memory.plan import SweepLimits
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.progress import Progress, Silent
from frugal_bonsai.stream.forward import Sweep
from frugal_bonsai.stream.head import Head
from frugal_bonsai.stream.layers import CODES, DENSE, ROWS, LayerStream
from frugal_bonsai.stream.skeleton import Skeleton
from frugal_bonsai.stream.source import CheckpointSource, HeadSource, LayerSource
from frugal_bonsai.stream.store import build_head_store

FLOAT, INT8_PRODUCTS = "float", "int8"
ARITHMETICS = (FLOAT, INT8_PRODUCTS)


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 on an accelerator, fp32 on a CPU, where bf16 products are slower."""
    return torch.bfloat16 if is_accelerator(device) else torch.float32


class Engine:
    """Streams one model's layers over windows of tokens.

    Args:
        checkpoint: the model; it must stay open while the engine is used.
        spec: its description.
        device: where layers are computed.
        dtype: compute dtype.
        limits: from the memory plan.
        arithmetic: of masked evaluation. ``"float"`` multiplies in the compute dtype, ``"int8"``
            multiplies the stored codes.
        progress: receives each layer visit.
        disk: folder for hidden states that spill to disk; None is the system's for temporary files.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        *,
        device: torch.device,
        dtype: torch.dtype,
        limits: SweepLimits,
        arithmetic: str = FLOAT,
        progress: Progress | None = None,
        disk: Path | None = None,
    ) -> None:
        self.disk = disk or Path(tempfile.gettempdir())
        self.checkpoint, self.spec, self.device, self.dtype = checkpoint, spec, device, dtype
        self.int8_products = arithmetic == INT8_PRODUCTS
        self.progress: Progress = progress or Silent()
        self.skeleton = Skeleton(checkpoint, spec, device=device, dtype=dtype)
        self._limits = limits
        rows = HeadSource(checkpoint, spec, limits.head_rows)
        self.head = self._head(rows, ROWS)
        self.sweep = Sweep(self.skeleton, limits, progress=self.progress, disk=self.disk)

    def stream(self, source: LayerSource) -> LayerStream:
        """Open a stream of layers for forward passes in the compute dtype; close it after use."""
        return self._stream(source, ROWS)

    def dense_stream(self, source: LayerSource) -> LayerStream:
        """Open a stream of plain weight tensors, which may be read and changed."""
        return self._stream(source, DENSE)

    def evaluation_stream(self, source: LayerSource) -> LayerStream:
        """Open a stream of layers in the arithmetic of masked evaluation."""
        return self._stream(source, CODES if self.int8_products else ROWS)

    def _stream(self, source: LayerSource, products: str) -> LayerStream:
        return LayerStream(
            source,
            device=self.device,
            dtype=self.dtype,
            products=products,
            buffers=self._limits.layer_buffers,
            exact=self.spec.family.exact,
        )

    def evaluation_head(self, folder: Path, *, written: bool = False) -> Head:
        """Return the head in the arithmetic of masked evaluation.

        With int8 products, the rows of the head's weight are first written to ``folder`` as int8,
        unless another process has written them.
        """
        if not self.int8_products:
            return self.head
        rows = build_head_store(
            folder,
            self.checkpoint,
            self.spec,
            rows=self._limits.head_rows,
            device=self.device,
            written=written,
        )
        return self._head(rows, CODES)

    def _head(self, rows: LayerSource, products: str) -> Head:
        return Head(
            self.skeleton,
            rows,
            partial(self._stream, products=products),
            tokens=self._limits.head_tokens,
            progress=self.progress,
        )

    def native(self) -> LayerStream:
        """Open a stream of the checkpoint in its own precision."""
        return self.stream(CheckpointSource(self.checkpoint, self.spec))

    def losses(self, stream: LayerStream, tokens_NS: torch.Tensor, name: str) -> torch.Tensor:
        """Return the unmasked loss of tokens 2..S of every window, fp32 ``[N, S-1]``, CPU."""
        return self.sweep.losses(stream, self.head, tokens_NS, name=name)
