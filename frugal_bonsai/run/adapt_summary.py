"""The summary of an adaptation as plain values, and the papers beside its weights.

In: the adaptation, its plans, its training and its output. Out: a dictionary, which ``--json``
prints and the card and the tables are made of, and the files with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from frugal_bonsai.adapt.train import Trained
from frugal_bonsai.adapt.training_data import TrainingData
from frugal_bonsai.checkpoint.commit import write_bytes
from frugal_bonsai.model.layout import PADDED
from frugal_bonsai.report.adapt_card import adapt_card
from frugal_bonsai.report.card_parts import parent_name
from frugal_bonsai.run.adapt_plan import AdaptPlans, describe_part
from frugal_bonsai.run.adaptation import Adaptation
from frugal_bonsai.run.provenance import (
    ADAPT_REPORT_FILE,
    REPORT_FILE,
    read_provenance,
    read_report,
    with_step,
)
from frugal_bonsai.run.summary import describe_peaks, load_line, write_report
from frugal_bonsai.run.warnings import figure_warnings
from frugal_bonsai.version import package_version


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
