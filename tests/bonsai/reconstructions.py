"""One reconstruction of a tiny model, and everything that tests compare about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_models import Tiny

from frugal_bonsai.bonsai.importance.scores import ImportanceBuilder, ImportanceScores
from frugal_bonsai.bonsai.reconstruction.layer_pass import ReconstructionOptions
from frugal_bonsai.bonsai.reconstruction.reconstruct import Reconstruction
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.store import NATIVE, build_store

RIDGE = 1e-3


@dataclass(frozen=True)
class Outcome:
    """Result of a reconstruction; losses are those of tokens 2..S of every window."""

    refits: dict[str, torch.Tensor]
    residual: list[float]
    scores: ImportanceScores
    losses_NS: torch.Tensor
    dense_losses_NS: torch.Tensor
    forward_tokens: int


def reconstruct(
    tiny: Tiny,
    kept: KeepMask,
    tokens_NS: torch.Tensor,
    folder: Path,
    *,
    engine: Engine | None = None,
    weights: str = NATIVE,
    score: str = "exact",
    damping: float = RIDGE,
    held_out: int = 0,
    **options: Any,
) -> Outcome:
    """Reconstruct the masked model; ``options`` are those of ReconstructionOptions."""
    engine = engine or tiny.engine(micro_batch=8)
    refits: dict[str, torch.Tensor] = {}
    reconstruction = Reconstruction(
        engine.sweep,
        ReconstructionOptions(**{"ridge": RIDGE, **options}),
        save=lambda _, given: refits.update({n: w.clone() for n, w in given.items()}),
    )
    stores = {
        name: build_store(folder / name, tiny.checkpoint, tiny.spec, weights=weights, mask=alive)
        for name, alive in (("dense", KeepMask(tiny.spec.table)), ("pruned", kept))
    }
    generator = torch.Generator().manual_seed(0)
    builder = ImportanceBuilder(score, kept, damping=damping, generator=generator)
    with (
        engine.dense_stream(stores["dense"]) as dense,
        engine.dense_stream(stores["pruned"]) as pruned,
    ):
        result = reconstruction.run(dense, pruned, tokens_NS, builder, held_out=held_out)
    assert result.scores is not None
    with torch.inference_mode():
        losses_NS = engine.head.nll(result.hidden_pruned, tokens_NS)
        dense_losses_NS = engine.head.nll(result.hidden_dense, tokens_NS)
    return Outcome(
        refits=refits,
        residual=result.residual,
        scores=result.scores,
        losses_NS=losses_NS,
        dense_losses_NS=dense_losses_NS,
        forward_tokens=engine.sweep.forward_tokens,
    )
