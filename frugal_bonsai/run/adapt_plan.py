"""Plan the memory of an adaptation: teacher, training, and writing with measuring.

In: a prepared adaptation, or the user's options. Out: three memory plans, of which one part runs at
a time, and the same as plain values. Reads headers and text, no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from frugal_bonsai.adaptation.optimiser import allowed_optimisers
from frugal_bonsai.adaptation.settings import LORA
from frugal_bonsai.errors import BudgetError
from frugal_bonsai.memory.disk import DiskPlan, plan_training_disk
from frugal_bonsai.memory.plan import MemoryPlan, SweepWorkload, plan_memory
from frugal_bonsai.memory.training import TrainingPlan, plan_training
from frugal_bonsai.memory.training_items import ADAMW, TrainingWork, trained_sizes
from frugal_bonsai.progress import Silent
from frugal_bonsai.run.adaptation import Adaptation, prepare_adaptation
from frugal_bonsai.run.engine import measured_base_bytes
from frugal_bonsai.run.options import AdaptOptions
from frugal_bonsai.run.plan import plan_items, plan_phases
from frugal_bonsai.run.training_data import SAMPLED_TOGETHER
from frugal_bonsai.run.workload import copied_bytes

# Number of held-out windows that the plan expects at least: the data are split after planning.
_LEAST_MEASURED = 16


@dataclass(frozen=True, kw_only=True)
class AdaptPlans:
    """Memory plans of the parts of an adaptation.

    Attributes:
        teacher: of sampling and caching; None without a teacher.
        training: of the training.
        writing: of writing, verifying and measuring.
        disk: files of the whole run.
    """

    teacher: MemoryPlan | None
    training: TrainingPlan
    writing: MemoryPlan
    disk: DiskPlan

    def named(self) -> dict[str, MemoryPlan | TrainingPlan]:
        """Return the plans of the parts that run, by name, in order."""
        plans = {
            "teacher": self.teacher,
            "training": self.training,
            "writing and measuring": self.writing,
        }
        return {name: plan for name, plan in plans.items() if plan is not None}


def plan_adapt(pruned: str, options: AdaptOptions, folder: Path) -> dict[str, Any]:
    """Plan the memory of an adaptation without running it.

    Args:
        pruned: folder or hub id of the pruned model.
        options: options of ``adapt``.
        folder: run directory that ``adapt`` would use.

    Returns:
        Plain values (the output of ``adapt --dry-run --json``).

    Raises:
        BudgetError: it does not fit; names the largest item and the smallest cap that works.
        FrugalBonsaiError: any other error that ``adapt`` would raise before it begins.
    """
    with ExitStack() as stack:
        job = prepare_adaptation(
            pruned, options, folder, stack=stack, progress=Silent(), headers_only=True
        )
        return _describe(job, plan_adaptation(job))


def plan_adaptation(job: Adaptation) -> AdaptPlans:
    """Plan the memory of all parts.

    Raises:
        BudgetError: a part does not fit; of several parts the one that needs most.
    """
    spec, budget = job.pruned.spec, job.budget
    training = _training_work(job)
    bitsandbytes = training.lora or training.optimisers != (ADAMW,)  # peft imports it, too
    base = measured_base_bytes(spec, training=bitsandbytes)
    measured = max(_LEAST_MEASURED, 0 if job.eval_text is None else len(job.eval_text.windows_nS))
    writing = SweepWorkload(window=job.window, measured=(measured,), rewrite=True)
    makers: dict[str, Callable[[], MemoryPlan | TrainingPlan]] = {
        "training": partial(plan_training, spec, budget, training, base_bytes=base),
        "writing": partial(plan_memory, spec, budget, writing, base_bytes=base),
    }
    if job.teacher is not None:
        asked = partial(plan_memory, job.teacher.spec, budget, _teacher_work(job), base_bytes=base)
        makers = {"teacher": asked, **makers}
    plans: dict[str, Any] = {"teacher": None}
    refused: list[BudgetError] = []
    for name, make in makers.items():
        try:
            plans[name] = make()
        except BudgetError as error:
            refused.append(error)
    if refused:
        same = [error for error in refused if error.option == refused[0].option]
        raise max(same, key=lambda error: error.needed_bytes)
    return AdaptPlans(**plans, disk=_plan_disk(job, plans["training"]))


def _plan_disk(job: Adaptation, training: TrainingPlan) -> DiskPlan:
    """Predict the files of the run."""
    return plan_training_disk(
        job.pruned.spec,
        trained_sizes(job.pruned.spec, training.rank),
        optimiser=training.optimiser,
        cache_bytes=_cache_bytes(job),
        sampled_tokens=job.texts.sampled * job.window,
        companion_bytes=copied_bytes(job.pruned),
    )


def _cache_bytes(job: Adaptation) -> int:
    """Return the bytes of the teacher's answers on disk."""
    if job.teacher_settings is None:
        return 0
    window_bytes = job.teacher_settings.file_bytes(job.window, job.pruned.spec.hidden)
    return job.texts.count * window_bytes


def _teacher_work(job: Adaptation) -> SweepWorkload:
    """Return the work of sampling windows and of caching the teacher's answers."""
    top = 0 if job.teacher_settings is None else job.teacher_settings.top
    return SweepWorkload(
        window=job.window,
        measured=(job.texts.count,) if top else (),
        sampled=min(job.texts.sampled, SAMPLED_TOGETHER),
        top=top,
    )


def _training_work(job: Adaptation) -> TrainingWork:
    """Return the work of the training."""
    kept = job.teacher_settings
    return TrainingWork(
        window=job.window,
        batch=job.settings.batch,
        lora=job.settings.method == LORA,
        rank=job.settings.rank,
        weights=job.options.weights,
        optimisers=allowed_optimisers(job.settings.optimiser),
        top=0 if kept is None else kept.top,
        hidden_layers=0 if kept is None else len(kept.layers),
    )


def _describe(job: Adaptation, plans: AdaptPlans) -> dict[str, Any]:
    """Return the plans as plain values."""
    training, budget = plans.training, job.budget
    parts = [
        {"name": name, **describe_part(plan), "phases": plan_phases(plan)}
        for name, plan in plans.named().items()
    ]
    return {
        "model": job.pruned.name,
        "teacher": None if job.teacher is None else job.teacher.name,
        "family": job.pruned.spec.family.title,
        "parameters": job.pruned.spec.parameters,
        "device": job.device.type,
        "data": list(job.texts.names),
        "window": job.window,
        "windows": job.texts.count,
        "batch": job.settings.batch,
        "method": job.settings.method,
        "weights": training.weights,
        "rank": training.rank or None,
        "optimiser": training.optimiser,
        "micro_batch": training.micro_batch,
        "caps": {"host": budget.host_bytes, "gpu": budget.gpu_bytes},
        "totals": {
            **{where: max(part[f"{where}_bytes"] for part in parts) for where in ("host", "gpu")},
            "disk": plans.disk.total_bytes,
        },
        "cache_bytes": _cache_bytes(job),
        "files": [asdict(item) for item in plans.disk.peak().items],
        "parts": parts,
        "items": [{**asdict(item), "phases": list(phases)} for item, phases in training.all_items],
        "notes": list(budget.notes),
    }


def describe_part(plan: MemoryPlan | TrainingPlan) -> dict[str, Any]:
    """Return the totals and items of a plan as plain values."""
    return {
        "host_bytes": plan.total_bytes("host"),
        "gpu_bytes": plan.total_bytes("gpu"),
        "items": plan_items(plan),
    }
