"""Perplexity over windows without overlap.

In: a stream of a model's layers and token windows. Out: exp(mean NLL of tokens 2..S of each
window), no special tokens added. Peers' figures differ for want of the window length: always say
it. Holds what the sweep holds.

Shape suffixes: N windows, S tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from frugal_bonsai.checkpoint.finite import require_finite
from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.layers import LayerStream


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """A measured perplexity.

    Attributes:
        nll: mean negative log-likelihood of a token, nats.
        tokens: tokens that were predicted.
    """

    nll: float
    tokens: int

    @property
    def value(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)


def measure_perplexity(
    engine: Engine, stream: LayerStream, windows_NS: torch.Tensor, *, name: str = "perplexity"
) -> Perplexity:
    """Perplexity of a streamed model on windows of tokens.

    Raises:
        CheckpointError: the mean loss is no finite number; names the weights that cause it.
    """
    losses_NS = engine.losses(stream, windows_NS, name)
    nll = float(losses_NS.double().mean())
    if not math.isfinite(nll):
        require_finite(engine.checkpoint, engine.checkpoint.tensors)
        raise CheckpointError(
            f"{engine.checkpoint.folder}: {name}: the mean loss is {nll}, though all weights are "
            f"finite: the model overflows in {engine.dtype}; use another checkpoint"
        )
    return Perplexity(nll=nll, tokens=losses_NS.numel())
