"""The summary of a prune as plain values: what ``--json`` prints, the card is made of, tables show.

In: what the prune had and found. Out: a dictionary, and the papers beside the weights (card, mask,
report).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal_bonsai.checkpoint.commit import write_bytes, write_json
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import PER_LAYER
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.progress import Progress
from frugal_bonsai.report.card import model_card
from frugal_bonsai.report.card_parts import parent_name
from frugal_bonsai.run.plan import Prepared, plan_items
from frugal_bonsai.run.prepare import Model
from frugal_bonsai.version import package_version

if TYPE_CHECKING:
    import torch

    from frugal_bonsai.bonsai.calibration import Calibration
    from frugal_bonsai.bonsai.search import Found
    from frugal_bonsai.stream.engine import Engine

MASK_FILE, REPORT_FILE = "pruning_mask.json", "pruning_report.json"


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Token windows of the texts, read before the plan."""

    source_name: str
    windows_nS: torch.Tensor | None  # None for ``self``: sampled when the engine exists
    eval_name: str | None
    eval_NS: torch.Tensor | None
    planned_windows: int

    @property
    def eval_windows(self) -> int:
        """Windows of the user's own text."""
        return 0 if self.eval_NS is None else len(self.eval_NS)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the end of a prune needs from its beginning."""

    model: Model
    ready: Prepared
    memory: MemoryPlan
    engine: Engine
    calibration: Calibration
    texts: Texts
    progress: Progress


def describe(job: Job, found: Found) -> dict[str, Any]:
    """What was asked for and found, without the figures before and after."""
    model, ready, texts = job.model, job.ready, job.texts
    table = model.spec.table
    return {
        "version": package_version(),
        "model": model.name,
        "family": model.spec.family.title,
        "layout": ready.rules.layout,
        "tile": ready.rules.tile,
        "settings": ready.settings.to_json(),
        "calibration": {
            "source": texts.source_name,
            "window": ready.window,
            "windows": len(job.calibration.windows_NS),
            "held_out_windows": len(job.calibration.held_out_NS),
        },
        "eval_text": None
        if texts.eval_NS is None
        else {"name": texts.eval_name, "window": ready.window, "windows": len(texts.eval_NS)},
        "kept": found.mask.counts_with_experts(),
        "dense": KeepMask(table).counts_with_experts(),
        "layer_sparsity": _layer_sparsity(model, found.mask),
        "latency": None if ready.latency is None else ready.latency.describe(found.mask),
        "rounds": found.rounds,
        "forward_tokens": found.forward_tokens,
        "memory": describe_memory(job.memory, job.engine),
        "notes": [
            *ready.budget.notes,
            *ready.notes,
            *(r["note"] for r in found.rounds if "note" in r),
        ],
    }


def describe_memory(memory: MemoryPlan, engine: Engine) -> dict[str, Any]:
    """Caps, what the plan predicted and what was measured; micro-batches as planned and at the end.

    Args:
        memory: the plan.
        engine: that has done the work.
    """
    from frugal_bonsai.memory.meter import peak_gpu_bytes, peak_resident_bytes

    budget, gpu = memory.budget, memory.budget.gpu_bytes is not None
    return {
        "host_cap_bytes": budget.host_bytes,
        "host_predicted_bytes": memory.total_bytes("host"),
        "host_peak_bytes": peak_resident_bytes(),
        "gpu_cap_bytes": budget.gpu_bytes,
        "gpu_predicted_bytes": memory.total_bytes("gpu") if gpu else None,
        "gpu_peak_bytes": peak_gpu_bytes(engine.device, budget.context_bytes),
        "planned_micro_batch": engine.sweep.batches.planned,
        "final_micro_batch": engine.sweep.batches.size,
        "plan": plan_items(memory),
    }


def _layer_sparsity(model: Model, mask: KeepMask) -> list[float]:
    shares = []
    dropped = mask.dropped_layers()
    for layer, tensors in enumerate(model.spec.layer_tensors):
        if layer in dropped:
            shares.append(1.0)
            continue
        parameters = sum(math.prod(shape) for shape in tensors.values())
        groups = model.spec.table.of_layer(layer)
        removed = sum((g.count - mask.kept(g)) * g.unit_parameters for g in groups)
        removed += sum(g.joint_parameters for g in groups if not mask.kept(g))
        shares.append(removed / parameters)
    return shares


def load_line(out: Path, layout: str) -> str:
    """The line that loads the output."""
    if layout == PER_LAYER:
        return f"frugal_bonsai.load_pruned({str(out)!r})"
    return f"AutoModelForCausalLM.from_pretrained({str(out)!r})"


def write_papers(staged: Path, summary: dict[str, Any], spec: ModelSpec, mask: KeepMask) -> None:
    """The card, the mask and the report beside the weights."""
    from frugal_bonsai.rewrite.mask_file import write_mask

    write_mask(staged / MASK_FILE, parent_name(summary["model"]), spec, mask)
    write_json(staged / REPORT_FILE, summary)
    write_bytes(staged / "README.md", model_card(summary).encode())
