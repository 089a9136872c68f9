"""The end of an adaptation: write the adapted model, verify it, measure it, sum it up.

In: the pruned model, the best parameters on disk, the trained student's logits and the report of
its training. Out: a checkpoint of the pruned model's layout in a staging folder, the summary that
``--json`` prints, and the card and report that are made of it. The student is freed by then;
weights are read, merged and written one at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.adaptation.adapters import Merged, merged_weights
from frugal_bonsai.adaptation.state import BEST_FILE
from frugal_bonsai.adaptation.train import Trained
from frugal_bonsai.adaptation.training_data import TrainingData
from frugal_bonsai.checkpoint.commit import output_errors, write_bytes
from frugal_bonsai.evaluation.perplexity import measure_texts
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.memory.work import VERIFY_WINDOWS
from frugal_bonsai.model.layout import PADDED, PER_LAYER, UNIFORM, layout_rules
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.report.adapt_card import adapt_card
from frugal_bonsai.report.card_parts import parent_name
from frugal_bonsai.rewrite.verify import compare_logits, compare_student
from frugal_bonsai.run.adapt_plan import AdaptPlans, describe_part
from frugal_bonsai.run.adaptation import Adaptation
from frugal_bonsai.run.engine import make_engine
from frugal_bonsai.run.open import Model, write_output
from frugal_bonsai.run.provenance import (
    ADAPT_REPORT_FILE,
    MASK_FILE,
    REPORT_FILE,
    read_provenance,
    read_report,
    with_step,
)
from frugal_bonsai.run.summary import describe_peaks, load_line, write_report
from frugal_bonsai.run.warnings import figure_warnings
from frugal_bonsai.stream.source import CheckpointSource
from frugal_bonsai.version import package_version


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


def describe_adaptation(
    job: Adaptation,
    plans: AdaptPlans,
    data: TrainingData,
    trained: Trained,
    before: Mapping[str, Any],
    written: Mapping[str, Any],
    out: Path,
) -> dict[str, Any]:
    """Return the summary without the time of the whole run.

    ``before`` has the figures of the pruned model; ``written`` is what ``write_adapted`` returns.
    """
    parts, bounds = plans.named(), ("kl", "kl_upper")
    summary = {
        "version": package_version(),
        "model": job.pruned.name,
        "teacher": None if job.teacher is None else job.teacher.name,
        "family": job.pruned.spec.family.model_type,
        "settings": asdict(job.settings),
        "data": {
            "sources": list(job.texts.names),
            "window": job.window,
            "windows": data.trained,
            "held_out_windows": data.held_out,
        },
        "cache": _describe_cache(job, data),
        "training": _describe_training(trained, plans),
        "eval_text": None if job.eval_text is None else job.eval_text.describe(),
        # The training has measured the pruned model's held-out windows, and both divergences.
        "before": {**before, **{key: trained.before[key] for key in ("perplexity", *bounds)}},
        "after": {**written["after"], **{key: trained.after[key] for key in bounds}},
        "verify": written["verify"],
        "layout": written["layout"],
        "memory": {
            **describe_peaks(list(parts.values()), job.device),
            "plans": {name: describe_part(plan) for name, plan in parts.items()},
        },
        "notes": [*job.budget.notes, *job.pruned.notes, *_padding_note(job.pruned.folder)],
        "out": str(out),
        "load": load_line(out, written["layout"], job.pruned.spec),
        "multimodal": job.pruned.whole,
    }
    summary["warnings"] = _warnings(summary["before"], summary["after"])
    summary["provenance"] = with_step(_provenance(job), "adapt", summary)
    return summary


def _provenance(job: Adaptation) -> dict[str, Any]:
    """Return the provenance of the pruned model; the teacher's where it has none of its own."""
    provenance = read_provenance(job.pruned)
    if job.teacher is not None and not provenance["steps"]:
        provenance |= {"dense": parent_name(job.teacher.name)}
    if job.teacher is not None and provenance["base_model"] is None:
        provenance["base_model"] = read_provenance(job.teacher)["base_model"]
    return provenance


def _warnings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return warnings about the figures of the adapted model."""
    found = list(figure_warnings(before, after, advice="train with a lower --learning-rate"))
    if before["kl"] is not None and after["kl"] > before["kl"]:
        found.append(
            f"the divergence from the teacher grew from {before['kl']:.3g} to {after['kl']:.3g} "
            f"nats: train on more text or for longer (--tokens), or with a lower --learning-rate"
        )
    return found


def write_papers(staged: Path, summary: Mapping[str, Any]) -> None:
    """Write the card and the report beside the weights."""
    write_report(staged / ADAPT_REPORT_FILE, summary)
    write_bytes(staged / "README.md", adapt_card(summary).encode())


def _describe_cache(job: Adaptation, data: TrainingData) -> dict[str, Any] | None:
    settings = job.teacher_settings
    if data.cache is None or settings is None:
        return None
    return {
        **asdict(settings),
        "size_bytes": data.cache.size_bytes,
        "rest_mass": data.cache.rest_mass(),
    }


def _describe_training(trained: Trained, plans: AdaptPlans) -> dict[str, Any]:
    plan = plans.training
    return {
        "weights": plan.weights,
        "rank": plan.rank or None,
        "optimiser": plan.optimiser,
        "micro_batch": plan.micro_batch,
        "steps": trained.step,
        "tokens": trained.tokens,
        "seconds": trained.seconds,
        "best_step": trained.best_step,
        "stopped": trained.stopped,
        "history": trained.history,
    }


def _padding_note(folder: Path) -> list[str]:
    """Return a note for a padded model, whose padding is trained like all other weights."""
    if read_report(folder / REPORT_FILE).get("layout") != PADDED:
        return []
    return ["padded layout: the zeros that filled layers up were trained and are units now"]
