"""``plan``: predict what a prune holds in memory and how long it takes; run nothing.

In: a model and options. Out: the memory plan and the predicted time, also as plain values. Reads
config and tensor headers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from frugal_bonsai.errors import BudgetError
from frugal_bonsai.hardware.profile import NOMINAL_BASE_BYTES
from frugal_bonsai.hardware.prune_time import PruneTime
from frugal_bonsai.hardware.throughput import SAMPLING, TimeEstimate
from frugal_bonsai.memory.plan import MemoryPlan, PruneWorkload, plan_memory
from frugal_bonsai.memory.training import TrainingPlan
from frugal_bonsai.memory.work import BASE
from frugal_bonsai.report.words import duration
from frugal_bonsai.run.engine import measured_base_bytes
from frugal_bonsai.run.keywords import prune_options
from frugal_bonsai.run.machine import no_gpu_advice
from frugal_bonsai.run.open import Model, open_model
from frugal_bonsai.run.options import PruneOptions
from frugal_bonsai.run.resolve import ResolvedPrune, resolve
from frugal_bonsai.run.workload import forward_tokens, prune_workload
from frugal_bonsai.sizes import format_bytes

# Windows that the dense model writes, as a multiple of the calibration windows: docs/method.md.
WRITTEN_SHARE = 2


def plan(model: str, options: PruneOptions | None = None, **named: Any) -> dict[str, Any]:
    """Predict the memory and the time of a prune.

    Args:
        model: Folder, GGUF file, hub id, ``example``, or a ``config.json`` without weights.
        options: Options of the prune as one object, instead of keywords. With a profile, its
            machine is planned for.
        named: Options of the prune by name: those of ``frugal-bonsai plan``, with underscores.

    Returns:
        Plain values (what ``plan --json`` prints).

    Raises:
        BudgetError: The prune does not fit; names the largest item and the smallest cap that works.
        FrugalBonsaiError: The prune would be refused before it begins.
    """
    options = prune_options(named, options)
    with open_model(
        model,
        headers_only=True,
        assume_family=options.assume_family,
        text_only=options.text_only,
        config_alone=True,
    ) as opened:
        resolved = resolve(opened, options, elsewhere=options.profile is not None)
        values = describe_plan(plan_fitting(opened, resolved, resolved.windows))
        return {"advice": no_gpu_advice(options, resolved.machine.device), **values}


@dataclass(frozen=True, kw_only=True)
class PlannedPrune:
    """A prune whose work fits into the caps.

    Attributes:
        model: The dense model.
        resolved: Resolved options with the number of windows that the model writes.
        work: The workload.
        memory: Its memory plan.
    """

    model: Model
    resolved: ResolvedPrune
    work: PruneWorkload
    memory: MemoryPlan

    def estimate(self) -> TimeEstimate:
        """Return the predicted time, with the rates of the machine."""
        return PruneTime(
            spec=self.model.spec,
            operations=self.resolved.operations,
            work=self.work,
            plan=self.memory,
            profile=self.resolved.machine.rates,
        ).estimate()


def plan_fitting(
    model: Model,
    resolved: ResolvedPrune,
    windows: int,
    *,
    eval_windows: int = 0,
    custom_utility: bool = False,
) -> PlannedPrune:
    """Plan a prune; decide how many windows the dense model writes, if the user did not.

    It writes :data:`WRITTEN_SHARE` times as many as the calibration has, or the largest half,
    quarter and so on of this that fits. The arguments are those of :func:`prune_workload`.

    Raises:
        BudgetError: The prune does not fit into the caps.
    """
    given = resolved.settings.self_windows
    most = WRITTEN_SHARE * windows
    counts = [most, most // 2, most // 4, most // 8, 0] if given is None else [given]
    for count in counts:
        settings = replace(resolved.settings, self_windows=count)
        chosen = replace(resolved, settings=settings)
        work = prune_workload(
            model, chosen, windows, eval_windows=eval_windows, custom_utility=custom_utility
        )
        try:
            memory = plan_prune(model, chosen, work)
            return PlannedPrune(model=model, resolved=chosen, work=work, memory=memory)
        except BudgetError:
            if count == counts[-1]:
                raise
    raise AssertionError("the last count fits or raises")


def plan_prune(model: Model, resolved: ResolvedPrune, work: PruneWorkload) -> MemoryPlan:
    """Return the memory plan of a prune.

    Raises:
        BudgetError: The prune does not fit into the caps.
    """
    machine = resolved.machine
    if machine.elsewhere:
        base_bytes = NOMINAL_BASE_BYTES[machine.device.type]
    else:
        base_bytes = measured_base_bytes(model.spec)
    return plan_memory(model.spec, machine.budget, work, base_bytes=base_bytes)


def predict(planned: PlannedPrune) -> dict[str, Any] | None:
    """Return the predicted time as plain values; None if the user names no profile."""
    if planned.resolved.machine.profile is None:
        return None
    return time_model(planned)


def time_model(planned: PlannedPrune) -> dict[str, Any]:
    """Return the time by the machine's rates as plain values: those of a profile, else measured."""
    rates = planned.resolved.machine.rates
    return {**_describe_time(planned.estimate()), "profile": rates.source}


def sampling_note(planned: PlannedPrune) -> str:
    """Return a note on how long it takes to sample the text of ``--calibration self``."""
    work = planned.work
    [phase] = [phase for phase in planned.estimate().phases if phase.name == SAMPLING]
    return (
        f"{work.sampled} windows of {work.window} tokens are sampled from the model "
        f"first: {work.window - 1} sweeps over all its layers, one a token, "
        f"about {duration(phase.seconds)}"
    )


def spill_note(planned: PlannedPrune) -> str:
    """Return a note on the hidden states that lie on disk, and what that costs in time."""
    memory = planned.memory
    kept = replace(memory, limits=replace(memory.limits, on_disk=False))
    in_memory = replace(planned, memory=kept).estimate().total_seconds
    seconds = max(0.0, planned.estimate().total_seconds - in_memory)
    return (
        f"--max-cpu-mem {format_bytes(memory.budget.host_bytes)} is too small for all hidden "
        f"states: up to {format_bytes(memory.spilled_bytes)} of them lie in the run folder, which "
        f"takes about {duration(seconds)} of the predicted time"
    )


def describe_plan(planned: PlannedPrune) -> dict[str, Any]:
    """Return a memory plan and the predicted time as plain values."""
    model, resolved, work, memory = planned.model, planned.resolved, planned.work, planned.memory
    machine, limits = resolved.machine, memory.limits
    notes = [*machine.budget.notes, *resolved.notes, *model.notes]
    if work.sampled:
        notes.append(sampling_note(planned))
    if memory.spilled_bytes:
        notes.append(spill_note(planned))
    return {
        "model": model.name,
        "family": model.spec.family.title,
        "parameters": model.spec.parameters,
        "device": machine.device.type,
        "device_name": machine.rates.name,
        "window": work.window,
        "windows": work.windows,
        "arithmetic": resolved.settings.arithmetic,
        "micro_batch": limits.micro_batch,
        "windows_in_flight": limits.windows_in_flight,
        "concurrent_masks": work.concurrent_masks(limits.windows_in_flight),
        "rounds": work.rounds,
        "ranks": work.ranks,
        "forward_tokens": forward_tokens(model.spec, work, memory),
        **_describe_time(planned.estimate()),
        **_describe_memory(memory, nominal_base=machine.elsewhere),
        "notes": notes,
        "profile": machine.rates.source,
    }


def _describe_time(estimate: TimeEstimate) -> dict[str, Any]:
    """Return a time estimate as plain values, in seconds."""
    return {
        "seconds": estimate.total_seconds,
        "binds": estimate.binds,
        "phases": [
            {
                "name": phase.name,
                "seconds": phase.seconds,
                "compute": phase.compute,
                "elementwise": phase.elementwise,
                "disk": phase.disk,
                "copy": phase.copy,
                "binds": phase.binds,
            }
            for phase in estimate.phases
        ],
    }


def _describe_memory(memory: MemoryPlan, *, nominal_base: bool) -> dict[str, Any]:
    """Return a memory plan as plain values; the process of another machine has a nominal size."""
    items = plan_items(memory)
    for item in items:
        if nominal_base and item["name"] == BASE:
            item["formula"] = "nominal"
    return {
        "items": items,
        "totals": {where: memory.total_bytes(where) for where in ("host", "gpu", "disk")},
        "caps": {"host": memory.budget.host_bytes, "gpu": memory.budget.gpu_bytes},
        "binding": memory.binding.name,
        "peak_phases": {where: memory.peak_phase(where).name for where in ("host", "gpu")},
        "memory_phases": plan_phases(memory),
    }


def plan_phases(memory: MemoryPlan | TrainingPlan) -> list[dict[str, Any]]:
    """Return the bytes of each phase of a plan as plain values."""
    return [
        {
            "name": phase.name,
            "host_bytes": phase.total_bytes("host"),
            "gpu_bytes": phase.total_bytes("gpu"),
        }
        for phase in memory.phases
    ]


def plan_items(memory: MemoryPlan | TrainingPlan) -> list[dict[str, Any]]:
    """Return the items of a plan as plain values."""
    return [asdict(item) for item in memory.items]
