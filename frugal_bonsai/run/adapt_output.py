"""Write the adapted model, verify it and measure it.

In: the pruned model, the best parameters on disk, the trained student's logits. Out: a checkpoint
of the pruned model's layout in a staging folder, and its figures. The student is freed by then;
weights are read, merged and written one at a time.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.adapt.adapters import Merged, merged_weights
from frugal_bonsai.adapt.state import BEST_FILE
from frugal_bonsai.checkpoint.commit import output_errors
from frugal_bonsai.evaluation.perplexity import measure_texts
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.memory.work import VERIFY_WINDOWS
from frugal_bonsai.model.layout import PER_LAYER, UNIFORM, layout_rules
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.verify import compare_logits, compare_student
from frugal_bonsai.run.adaptation import Adaptation
from frugal_bonsai.run.engine import make_engine
from frugal_bonsai.run.open import Model, write_output
from frugal_bonsai.run.provenance import MASK_FILE, REPORT_FILE
from frugal_bonsai.stream.source import CheckpointSource


def measure(
    model: Model,
    plan: MemoryPlan,
    job: Adaptation,
    held_out_NS: torch.Tensor | None,
    *,
    what: str,
) -> dict[str, Any]:
    """Return the sizes of the pruned or the adapted model and its perplexities, as plain values.

    These are of the text of ``--eval-text``, and of the held-out windows unless they are None.
    """
    keys = ("perplexity", "eval_perplexity")
    found: dict[str, float | None] = dict.fromkeys([*keys, *(f"{key}_error" for key in keys)])
    if held_out_NS is not None or job.eval_text is not None:
        engine = make_engine(model, plan, job.device, job.progress)
        # Only the adapted model has held-out windows here.
        written = held_out_NS is not None
        found = measure_texts(engine, held_out_NS, job.eval_text, what, written=written)
    return {**model.sizes, **found}


def write_adapted(
    job: Adaptation,
    plan: MemoryPlan,
    staged: Path,
    *,
    held_out_NS: torch.Tensor,
    student_NSV: torch.Tensor,
) -> dict[str, Any]:
    """Write the adapted model into the staging folder, verify it, measure it.

    Args:
        job: the adaptation.
        plan: memory of this part.
        staged: an empty folder.
        held_out_NS: held-out windows.
        student_NSV: the student's fp32 logits for the first tokens of the first held-out windows.

    Returns:
        Plain values: the layout, differences that the verification found, figures of the model.

    Raises:
        VerifyError: the output computes something else than the student.
    """
    model, layout = job.pruned, _layout_of(job.pruned)
    best, scaling = job.folder / BEST_FILE, job.settings.scaling
    with (
        merged_weights(model.checkpoint, best, scaling=scaling) as merged,
        write_output(
            staged,
            model,
            KeepMask(model.spec.table),
            layout_rules(model.spec, layout, tile=1),
            refit=merged,
            max_shard_bytes=job.shard_bytes,
        ) as (adapted, _),
    ):
        _copy_reports(model.folder, staged)
        verify = _verify(job, plan, adapted, merged, held_out_NS, student_NSV)
        after = measure(adapted, plan, job, held_out_NS, what="adapted")
    return {"layout": layout, "verify": verify, "after": after}


def _layout_of(model: Model) -> str:
    """Return the layout; only layers of different widths need the bundled model file."""
    config = model.checkpoint.config
    return PER_LAYER if config.get("per_layer_config") or config.get("auto_map") else UNIFORM


def _copy_reports(source: Path, staged: Path) -> None:
    """Copy the pruned model's mask and report."""
    for name in (MASK_FILE, REPORT_FILE):
        if (source / name).is_file():
            with output_errors(staged / name):
                shutil.copyfile(source / name, staged / name)


def _verify(
    job: Adaptation,
    plan: MemoryPlan,
    adapted: Model,
    merged: Merged,
    windows_NS: torch.Tensor,
    student_NSV: torch.Tensor,
) -> dict[str, Any]:
    """Compare the output with the merged weights, and these with the student, all in fp32.

    The output is compared with merged weights in the stored dtype, the student with merged weights
    in fp32. So neither difference contains rounding, which would be larger than many defects.

    Raises:
        VerifyError: a difference is larger than sums in another order explain.
    """
    parent, output = (
        make_engine(one, plan, job.device, job.progress, dtype=torch.float32)
        for one in (job.pruned, adapted)
    )

    def merged_source(dtype: str | None = None) -> CheckpointSource:
        spec, keep = job.pruned.spec, KeepMask(job.pruned.spec.table)
        return CheckpointSource(job.pruned.checkpoint, spec, mask=keep, refit=merged, dtype=dtype)

    windows_NS = windows_NS[:VERIFY_WINDOWS]
    difference = compare_logits(parent, merged_source(), output, windows_NS)
    return {
        "max_relative_difference": difference,
        "student_difference": compare_student(
            parent, merged_source("F32"), windows_NS, student_NSV
        ),
        "windows": len(windows_NS),
    }
