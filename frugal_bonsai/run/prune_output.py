"""The end of a prune: the pruned model written, verified and measured.

In: a :class:`~frugal_bonsai.run.prepare.PruneRun` and the result of its search. Out: the model in a
staging folder, and figures as plain values. Holds one tensor, then what the sweeps hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.bonsai.search import SearchResult
from frugal_bonsai.evaluation.perplexity import measure_texts
from frugal_bonsai.memory.work import VERIFY_WINDOWS
from frugal_bonsai.rewrite.companions import write_companions
from frugal_bonsai.rewrite.shrink import shrink
from frugal_bonsai.rewrite.verify import compare_logits
from frugal_bonsai.run.engine import in_fp32, make_engine
from frugal_bonsai.run.open import open_output
from frugal_bonsai.run.prepare import PruneRun
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.source import CheckpointSource


def measure_dense(run: PruneRun) -> dict[str, Any]:
    """Return the sizes and perplexities of the dense model."""
    text = run.texts.eval_text
    found = measure_texts(run.engine, run.calibration.held_out_NS, text, "dense")
    return {**run.model.sizes, **found}


def write_pruned(run: PruneRun, found: SearchResult, staged: Path) -> dict[str, Any]:
    """Write the pruned model, verify it and measure it.

    Args:
        run: The prune.
        found: Result of its search.
        staged: Staging folder.

    Raises:
        VerifyError: The pruned model computes something else than the masked parent.
    """
    rewritten = shrink(
        run.model.checkpoint,
        run.model.spec,
        found.mask,
        staged,
        rules=run.resolved.rules,
        refit=found.refits,
        max_shard_bytes=run.resolved.shard_bytes,
    )
    write_companions(run.model.folder, staged, processor=run.model.spec.multimodal is not None)
    with open_output(staged, run.model) as output:
        engine = make_engine(output, run.memory, run.engine.device, run.engine.progress)
        held_out_NS, text = run.calibration.held_out_NS, run.texts.eval_text
        windows_NS = held_out_NS[:VERIFY_WINDOWS]
        difference = _verify(run, found, engine, windows_NS)
        after = measure_texts(engine, held_out_NS, text, "pruned", written=True)
        return {
            "after": {**output.sizes, **after},
            "written_as": output.spec.family.title,
            "sparsity": rewritten.sparsity,
            "verify": {"max_relative_difference": difference, "windows": len(windows_NS)},
        }


def _verify(
    run: PruneRun, found: SearchResult, rewritten: Engine, windows_NS: torch.Tensor
) -> float:
    """Compare the rewritten model with the masked parent, both in fp32.

    In bf16 the rounding of 32 layers is as large as the change that a defect makes.
    """
    spec, parent = run.model.spec, in_fp32(run.engine, run.memory)
    norm = {name: found.refits[name]() for name in spec.norm_tensors if name in found.refits}
    parent.skeleton.replace_norm(norm)
    masked = CheckpointSource(run.model.checkpoint, spec, mask=found.mask, refit=found.refits)
    return compare_logits(parent, masked, in_fp32(rewritten, run.memory), windows_NS)
