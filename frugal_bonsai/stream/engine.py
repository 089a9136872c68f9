"""One model, one device, one plan: what the sweeps of a run share.

In: an open checkpoint, its description, device, compute dtype and the plan's limits. Out: streams,
the head, the sweep. Holds the skeleton (final norm, rotary embeddings) and, where it fits in one
chunk, the head.
"""

from __future__ import annotations

import torch

from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.memory.plan import SweepLimits
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.progress import Progress, Silent
from frugal_bonsai.stream.forward import Sweep
from frugal_bonsai.stream.head import Head
from frugal_bonsai.stream.layers import LayerStream
from frugal_bonsai.stream.skeleton import Skeleton
from frugal_bonsai.stream.source import CheckpointSource, LayerSource


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU; fp32 on a CPU, where bf16 products are slower."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class Engine:
    """Streams one model's layers over windows of tokens.

    Args:
        checkpoint: the model; stays open while the engine is used.
        spec: its description.
        device: where layers are computed.
        dtype: compute dtype.
        limits: from the memory plan.
        progress: told of each layer visit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        *,
        device: torch.device,
        dtype: torch.dtype,
        limits: SweepLimits,
        progress: Progress | None = None,
    ) -> None:
        self.checkpoint, self.spec, self.device, self.dtype = checkpoint, spec, device, dtype
        self.progress: Progress = progress or Silent()
        self.skeleton = Skeleton(checkpoint, spec, device=device, dtype=dtype)
        self.head = Head(
            checkpoint, self.skeleton, rows=limits.head_rows, tokens=limits.head_tokens
        )
        self.sweep = Sweep(self.skeleton, limits, progress=self.progress)

    def stream(self, source: LayerSource) -> LayerStream:
        """A stream of a source's layers; close it after use."""
        return LayerStream(source, device=self.device, dtype=self.dtype)

    def native(self) -> LayerStream:
        """The checkpoint itself in its own precision."""
        return self.stream(CheckpointSource(self.checkpoint, self.spec))

    def losses(self, stream: LayerStream, tokens_NS: torch.Tensor, name: str) -> torch.Tensor:
        """Unmasked loss of tokens 2..S of every window, fp32 ``[N, S-1]`` on the CPU."""
        return self.sweep.losses(stream, self.head, tokens_NS, name=name)
