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

from frugal_bonsai.adapt.merge import Merged, merged_weights
from frugal_bonsai.adapt.state import BEST_FILE
from frugal_bonsai.checkpoint.commit import output_errors
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import VerifyError
from frugal_bonsai.evaluation.perplexity import measure_perplexity
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.model.canonical_names import describe_checkpoint
from frugal_bonsai.model.layout import PER_LAYER, UNIFORM, layout_rules
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.companions import write_companions
from frugal_bonsai.rewrite.shrink import shrink
from frugal_bonsai.rewrite.verify import TOLERANCE, compare_logits
from frugal_bonsai.run.adaptation import Adaptation
from frugal_bonsai.run.engine import make_engine
from frugal_bonsai.run.open import Model
from frugal_bonsai.run.summary import MASK_FILE, REPORT_FILE
from frugal_bonsai.sizes import parse_bytes
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.layers import LayerStream
from frugal_bonsai.stream.source import CheckpointSource

# Held-out windows whose logits the verification compares.
VERIFY_WINDOWS = 2


def measure(
    model: Model,
    plan: MemoryPlan,
    job: Adaptation,
    held_out_NS: torch.Tensor | None,
    *,
    what: str,
) -> dict[str, Any]:
    """Return a model's sizes and its perplexities, as plain values.

    Args:
        model: the pruned or the adapted model.
        plan: memory of the sweeps.
        job: the adaptation; has the text of ``--eval-text``.
        held_out_NS: held-out windows; None leaves their perplexity out.
        what: name of the model for the progress.
    """
    sizes = {
        "parameters": model.spec.parameters,
        "block_parameters": model.spec.block_parameters,
        "weight_bytes": model.checkpoint.weight_bytes,
    }
    texts: dict[str, tuple[str, torch.Tensor]] = {}
    if held_out_NS is not None:
        texts["perplexity"] = (f"{what}: held-out perplexity", held_out_NS)
    if job.eval_text is not None:
        name, windows_NS = job.eval_text
        texts["eval_perplexity"] = (f"{what}: perplexity on {name}", windows_NS)
    found: dict[str, float | None] = {"perplexity": None, "eval_perplexity": None}
    if texts:
        engine = make_engine(model, plan, job.device, job.progress)
        with engine.native() as stream:
            for key, (name, windows_NS) in texts.items():
                found[key] = measure_perplexity(engine, stream, windows_NS, name=name).value
    return {**sizes, **found}


def write_adapted(
    job: Adaptation,
    plan: MemoryPlan,
    staged: Path,
    *,
    scaling: float,
    held_out_NS: torch.Tensor,
    student_NSV: torch.Tensor,
) -> dict[str, Any]:
    """Write the adapted model into the staging folder, verify it, measure it.

    Args:
        job: the adaptation.
        plan: memory of this part.
        staged: an empty folder.
        scaling: factor of the adapters' product.
        held_out_NS: held-out windows.
        student_NSV: the student's fp32 logits for the first tokens of the first held-out windows.

    Returns:
        Plain values: the layout, differences that the verification found, figures of the model.

    Raises:
        VerifyError: the output computes something else than the student.
    """
    model, layout = job.pruned, _layout_of(job.pruned)
    with merged_weights(model.checkpoint, job.folder / BEST_FILE, scaling=scaling) as merged:
        shrink(
            model.checkpoint,
            model.spec,
            KeepMask(model.spec.table),
            staged,
            rules=layout_rules(model.spec, layout, tile=1),
            refit=merged,
            max_shard_bytes=parse_bytes(job.options.max_shard_size, option="--max-shard-size"),
        )
        write_companions(model.folder, staged)
        _copy_reports(model.folder, staged)
        with Checkpoint.open(staged) as output:
            spec = describe_checkpoint(output, source="the adapted config.json")
            adapted = Model(name=str(staged), checkpoint=output, spec=spec)
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
        "student_difference": _compare_student(
            parent, merged_source("F32"), windows_NS, student_NSV
        ),
        "windows": len(windows_NS),
    }


def _compare_student(
    engine: Engine, merged: CheckpointSource, windows_NS: torch.Tensor, student_NSV: torch.Tensor
) -> float:
    """Return the largest difference of the student's logits, relative to its largest logit.

    Args:
        engine: the pruned model's, in fp32.
        merged: its layers with the merged weights in fp32.
        windows_NS: the windows.
        student_NSV: the student's logits of their first tokens.

    Raises:
        VerifyError: the difference is larger than sums in another order explain.
    """
    tokens_NS, largest = windows_NS[:, : student_NSV.shape[1]], torch.zeros(())
    # One buffer in fp32 is no larger than the two in 16 bits that the plan has.
    with LayerStream(merged, device=engine.device, dtype=engine.dtype, buffers=1) as stream:
        hidden = engine.sweep.run(stream, tokens_NS, name="verify: student")
    with torch.inference_mode():
        for window, student_SV in enumerate(student_NSV):
            found_SV = engine.head.logits(hidden.read(slice(window, window + 1)))[0].cpu()
            largest = torch.maximum(largest, (found_SV - student_SV).abs().max())
    relative = float(largest) / max(float(student_NSV.abs().max()), 1e-30)
    if not relative <= TOLERANCE[torch.float32]:
        raise VerifyError(
            f"the merged weights' logits differ from the student's by {relative:.2e} of the "
            f"largest logit, allowed are {TOLERANCE[torch.float32]:.0e}; nothing was written. This "
            f"is a defect: please report it with the model's config.json"
        )
    return relative
