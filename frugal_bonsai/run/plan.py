"""``plan``: what a prune would hold in memory and how long it would take; runs nothing.

In: a model and options. Out: a :class:`Prepared` prune, of which ``prune`` runs the rest, and the
plan as plain values.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal_bonsai.accelerator import is_accelerator
from frugal_bonsai.bonsai.methods import make_settings
from frugal_bonsai.bonsai.settings import EXPERTS, LATENCY, PruneSettings
from frugal_bonsai.errors import OptionError
from frugal_bonsai.hardware.latency import LatencyModel
from frugal_bonsai.hardware.operations import LayerOperations
from frugal_bonsai.hardware.profile import NOMINAL_BASE_BYTES, HardwareProfile
from frugal_bonsai.hardware.profile_file import read_profile
from frugal_bonsai.hardware.prune_time import estimate_time
from frugal_bonsai.hardware.time_model import SAMPLING, TimeEstimate
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.plan import MemoryPlan, PruneWorkload, plan_memory
from frugal_bonsai.memory.training import TrainingPlan
from frugal_bonsai.memory.work import BASE
from frugal_bonsai.model.layout import LayoutRules, layout_rules
from frugal_bonsai.run.compatibility import require_layout, settings_that_apply
from frugal_bonsai.run.machine import (
    choose_budget,
    choose_device,
    no_gpu_advice,
    with_arithmetic,
)
from frugal_bonsai.run.options import PruneOptions
from frugal_bonsai.run.predict import describe_phases
from frugal_bonsai.run.prepare import (
    CPU_TILE,
    DEFAULT_SOURCE,
    EXAMPLE_SOURCE,
    GPU_TILE,
    Model,
    assumption,
    choose_window,
    measured_base_bytes,
    open_model,
)
from frugal_bonsai.run.workload import forward_tokens, prune_workload

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A prune that has been thought through but not begun.

    Attributes:
        settings: of the method.
        rules: of the layout.
        window: S.
        windows: calibration windows (as many as the text gives, once it is read).
        source: calibration source as named.
        device: where to compute.
        budget: caps.
        profile: of the machine that is planned for; None is this one.
        rates: that profile, or what a second of measuring here gives.
        operations: of the model's mean layer.
        elsewhere: that machine is another one, so nothing here is asked.
        latency: of the model on the profile's machine; None without a profile.
        notes: what of the method does not apply to this model.
    """

    settings: PruneSettings
    rules: LayoutRules
    window: int
    windows: int
    source: str
    device: torch.device
    budget: Budget
    rates: HardwareProfile
    operations: LayerOperations
    profile: HardwareProfile | None = None
    elsewhere: bool = False
    latency: LatencyModel | None = None
    notes: tuple[str, ...] = ()


def prepare(model: Model, options: PruneOptions, *, elsewhere: bool = False) -> Prepared:
    """Check the options against the model.

    Args:
        model: the model.
        options: the user's.
        elsewhere: plan for the profile's machine: its device, its memory; no device here is asked.

    Raises:
        FrugalBonsaiError: an option that cannot work.
    """
    from frugal_bonsai.bonsai.calibration import window_count
    from frugal_bonsai.bonsai.selection.cut import check_reachable
    from frugal_bonsai.bonsai.selection.whole import check_experts
    from frugal_bonsai.model.units import KeepMask
    from frugal_bonsai.run.profile import quick_profile
    from frugal_bonsai.stream.engine import compute_dtype
    from frugal_bonsai.stream.operations import count_operations

    settings = make_settings(options.method, options.settings)
    settings, notes = settings_that_apply(settings, options.settings, model.spec)
    window = choose_window(model.spec, options.window)
    profile = None if options.profile is None else read_profile(Path(options.profile))
    if settings.objective == LATENCY and profile is None:
        raise OptionError(
            "--objective latency: needs the rates of the machine that the model is for; measure "
            "this one with frugal-bonsai profile --out FILE, then add --profile FILE"
        )
    device = choose_device(options, profile, elsewhere=elsewhere)
    rules = layout_rules(
        model.spec,
        options.layout,
        tile=options.tile,
        default_tile=GPU_TILE if is_accelerator(device) else CPU_TILE,
        as_mistral=options.as_mistral,
    )
    if rules.as_mistral and settings.bias:
        raise OptionError("--as-mistral: a Mistral has no biases; leave it or --bias out")
    whole, blocks = KeepMask(model.spec.table), model.spec.block_parameters
    check_reachable(whole, settings.sparsity, rules, blocks, settings.allocation)
    if settings.allocation == EXPERTS:
        check_experts(whole, settings.sparsity, blocks)
    require_layout(model.spec, rules)
    default_source = EXAMPLE_SOURCE if model.name == "example" else DEFAULT_SOURCE
    rates = profile or quick_profile(device)
    operations = count_operations(model.spec, window, compute_dtype(device))
    return Prepared(
        settings=with_arithmetic(settings, operations, rates),
        rules=rules,
        window=window,
        windows=window_count(window, options.windows),
        source=options.calibration or default_source,
        device=device,
        budget=choose_budget(device, options, profile if elsewhere else None),
        profile=profile,
        rates=rates,
        elsewhere=elsewhere,
        operations=operations,
        latency=None
        if profile is None
        else LatencyModel(
            spec=model.spec,
            layer=operations,
            profile=profile,
            prompt_tokens=settings.prompt_tokens,
            generated_tokens=settings.generated_tokens,
        ),
        notes=notes,
    )


def plan_prune(model: Model, ready: Prepared, work: PruneWorkload) -> MemoryPlan:
    """The memory plan of a prepared prune.

    Raises:
        BudgetError: nothing fits.
    """
    if ready.elsewhere:
        base = NOMINAL_BASE_BYTES[ready.device.type]
    else:
        base = measured_base_bytes(model.spec)
    return plan_memory(model.spec, ready.budget, work, base_bytes=base)


def plan(model: str, options: PruneOptions) -> dict[str, Any]:
    """What a prune would hold and how long it would take, as plain values.

    With a profile, on the profile's machine, whatever this one is.
    """
    with open_model(model, headers_only=True, assume_family=options.assume_family) as opened:
        ready = prepare(opened, options, elsewhere=options.profile is not None)
        work = prune_workload(opened, ready, ready.windows)
        memory = plan_prune(opened, ready, work)
        values = describe_plan(opened, ready, work, memory)
        return {"advice": no_gpu_advice(options, ready.device), **values}


def describe_plan(
    model: Model, ready: Prepared, work: PruneWorkload, memory: MemoryPlan
) -> dict[str, Any]:
    """A memory plan and its time estimate as plain values."""
    profile = ready.rates
    estimate = estimate_time(model.spec, ready.operations, work, memory, profile)
    notes = [*ready.budget.notes, *ready.notes]
    if model.spec.family.assumed is not None:
        notes.append(assumption(model))
    if work.sampled:
        notes.append(_sampling_note(work, estimate))
    return {
        "model": model.name,
        "family": model.spec.family.title,
        "parameters": model.spec.parameters,
        "device": ready.device.type,
        "device_name": profile.name,
        "window": work.window,
        "windows": work.windows,
        "arithmetic": ready.settings.arithmetic,
        "micro_batch": memory.limits.micro_batch,
        "windows_in_flight": memory.limits.windows_in_flight,
        "concurrent_masks": work.concurrent_masks(memory.limits.windows_in_flight),
        "rounds": work.rounds,
        "forward_tokens": forward_tokens(model.spec, work, memory),
        "phases": describe_phases(estimate),
        "seconds": estimate.total_seconds,
        "binds": estimate.binds,
        "items": _named_base(plan_items(memory), ready),
        "totals": {where: memory.total_bytes(where) for where in ("host", "gpu", "disk")},
        "caps": {"host": ready.budget.host_bytes, "gpu": ready.budget.gpu_bytes},
        "binding": memory.binding.name,
        "peak_phases": {where: memory.peak_phase(where).name for where in ("host", "gpu")},
        "memory_phases": plan_phases(memory),
        "notes": notes,
        "profile": profile.source,
    }


def _named_base(items: list[dict[str, Any]], ready: Prepared) -> list[dict[str, Any]]:
    """What another machine's process holds is nominal, not measured."""
    nominal = {"formula": "nominal"} if ready.elsewhere else {}
    return [item | nominal if item["name"] == BASE else item for item in items]


def plan_phases(memory: MemoryPlan | TrainingPlan) -> list[dict[str, Any]]:
    """What each phase holds, as plain values."""
    return [
        {
            "name": phase.name,
            "host_bytes": phase.total_bytes("host"),
            "gpu_bytes": phase.total_bytes("gpu"),
        }
        for phase in memory.phases
    ]


def plan_items(memory: MemoryPlan | TrainingPlan) -> list[dict[str, Any]]:
    """The plan's items as plain values."""
    return [
        {
            "name": item.name,
            "where": item.where,
            "size_bytes": item.size_bytes,
            "formula": item.formula,
        }
        for item in memory.items
    ]


def sampling_note(model: Model, ready: Prepared, work: PruneWorkload, memory: MemoryPlan) -> str:
    """How long ``self`` samples its windows, for who is about to wait for it."""
    estimate = estimate_time(model.spec, ready.operations, work, memory, ready.rates)
    return _sampling_note(work, estimate)


def _sampling_note(work: PruneWorkload, estimate: TimeEstimate) -> str:
    from frugal_bonsai.report.words import duration

    [phase] = [phase for phase in estimate.phases if phase.name == SAMPLING]
    return (
        f"{work.sampled} windows of {work.window} tokens are sampled from the model "
        f"first: {work.window - 1} sweeps over all its layers, one a token, "
        f"about {duration(phase.seconds)}"
    )
