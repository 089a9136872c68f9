"""The memory of an adaptation: of the teacher's sweeps, of the training, of measuring and writing.

In: a prepared adaptation, or what the user says. Out: three plans that are not held together, and
the same as plain values. Reads headers and text, no weights; runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

from frugal_bonsai.errors import BudgetError
from frugal_bonsai.memory.plan import MemoryPlan, SweepWorkload, plan_memory
from frugal_bonsai.memory.training import TrainingPlan, plan_training
from frugal_bonsai.memory.training_items import ADAMW, TrainingWork
from frugal_bonsai.progress import Silent
from frugal_bonsai.run.adaptation import Adaptation, prepare_adaptation
from frugal_bonsai.run.options import AdaptOptions
from frugal_bonsai.run.plan import plan_items, plan_phases
from frugal_bonsai.run.prepare import measured_base_bytes
from frugal_bonsai.run.training_data import plan_teacher

if TYPE_CHECKING:
    from pathlib import Path

Plans = tuple[MemoryPlan | None, TrainingPlan, MemoryPlan]
_Plan = TypeVar("_Plan")
PARTS = ("teacher", "training", "writing and measuring")


def plan_adapt(pruned: str, options: AdaptOptions, run: Path) -> dict[str, Any]:
    """What ``adapt`` would hold, part by part and item by item; runs nothing.

    Args:
        pruned: folder or hub id of the pruned model.
        options: what ``adapt`` would be given.
        run: where it would keep its state.

    Returns:
        Plain values (what ``adapt --plan-only --json`` prints).

    Raises:
        BudgetError: it does not fit; names the largest item and the smallest cap that works.
        FrugalBonsaiError: whatever else ``adapt`` would refuse before it begins.
    """
    with ExitStack() as stack:
        job = prepare_adaptation(
            pruned,
            options,
            run,
            resume=False,
            progress=Silent(),
            stack=stack,
            headers_only=True,
        )
        return _describe(job, plan_adaptation(job, options))


def plan_adaptation(job: Adaptation, options: AdaptOptions) -> Plans:
    """The memory of the teacher's sweeps, of the training, of measuring and writing.

    Raises:
        BudgetError: one of them does not fit; of several the one that needs most.
    """
    from frugal_bonsai.adapt.adapters import LORA

    lora = job.settings.method == LORA
    base = measured_base_bytes(job.pruned.spec, training=lora or job.optimisers != (ADAMW,))
    top = 0 if job.asked is None else job.asked.top
    refused: list[BudgetError] = []

    def attempt(make: Callable[[], _Plan]) -> _Plan | None:
        try:
            return make()
        except BudgetError as error:
            refused.append(error)
            return None

    asked, teacher = None, job.teacher
    if teacher is not None:
        asked = attempt(
            lambda: plan_teacher(
                teacher, job.budget, job.sources, job.window, top=top, base_bytes=base
            )
        )
    work = TrainingWork(
        window=job.window,
        batch=job.settings.batch,
        lora=lora,
        rank=job.settings.rank,
        weights=options.weights,
        optimisers=job.optimisers,
        top=top,
        hidden_layers=0 if job.asked is None else len(job.asked.layers),
    )
    training = attempt(lambda: plan_training(job.pruned.spec, job.budget, work, base_bytes=base))
    windows = max(16, 0 if job.eval_NS is None else len(job.eval_NS))
    measuring = SweepWorkload(window=job.window, measured=(windows,), rewrite=True)
    writing = attempt(lambda: plan_memory(job.pruned.spec, job.budget, measuring, base_bytes=base))
    if training is None or writing is None or refused:
        same = [error for error in refused if error.option == refused[0].option]
        raise max(same, key=lambda error: error.needed_bytes)
    return asked, training, writing


def named_plans(plans: Plans) -> list[tuple[str, MemoryPlan | TrainingPlan]]:
    """The parts that there are, by name, in the order in which they come."""
    return [(name, plan) for name, plan in zip(PARTS, plans, strict=True) if plan is not None]


def _describe(job: Adaptation, plans: Plans) -> dict[str, Any]:
    """Plans as plain values."""
    training, budget, cache = plans[1], job.budget, 0
    if job.asked is not None:
        each = job.asked.file_bytes(job.window, job.pruned.spec.hidden)
        cache = job.sources.windows * each
    parts = [_describe_part(name, plan) for name, plan in named_plans(plans)]
    return {
        "model": job.pruned.name,
        "teacher": None if job.teacher is None else job.teacher.name,
        "family": job.pruned.spec.family.title,
        "parameters": job.pruned.spec.parameters,
        "device": job.device.type,
        "data": list(job.sources.names),
        "window": job.window,
        "windows": job.sources.windows,
        "batch": job.settings.batch,
        "method": job.settings.method,
        "weights": training.weights,
        "rank": training.rank or None,
        "optimiser": training.optimiser,
        "micro_batch": training.micro_batch,
        "caps": {"host": budget.host_bytes, "gpu": budget.gpu_bytes},
        "totals": {
            where: max(part[f"{where}_bytes"] for part in parts) for where in ("host", "gpu")
        },
        "cache_bytes": cache,
        "parts": parts,
        "items": [
            {
                "name": item.name,
                "where": item.where,
                "size_bytes": item.size_bytes,
                "formula": item.formula,
                "phases": list(phases),
            }
            for item, phases in training.all_items
        ],
        "notes": list(budget.notes),
    }


def _describe_part(name: str, plan: MemoryPlan | TrainingPlan) -> dict[str, Any]:
    return {
        "name": name,
        "host_bytes": plan.total_bytes("host"),
        "gpu_bytes": plan.total_bytes("gpu"),
        "phases": plan_phases(plan),
        "items": plan_items(plan),
    }
