"""``plan``: what a prune would hold in memory and how long it would take; runs nothing.

In: a model and options. Out: a :class:`Prepared` prune, of which ``prune`` runs the rest, and the
plan as plain values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from frugal_bonsai.bonsai.settings import PruneSettings, make_settings
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.plan import MemoryPlan, Work, plan_memory
from frugal_bonsai.model.layout import LayoutRules, layout_rules
from frugal_bonsai.run.options import PruneOptions
from frugal_bonsai.run.prepare import (
    DEFAULT_SOURCE,
    DEFAULT_TILE,
    EXAMPLE_SOURCE,
    Model,
    choose_window,
    measured_base_bytes,
    open_model,
)
from frugal_bonsai.text.sources import SELF

if TYPE_CHECKING:
    import torch

    from frugal_bonsai.memory.hardware import HardwareProfile

# What one call of a layer costs beside its arithmetic, which is small for one token a window.
_LAYER_CALL_SECONDS = 1e-3


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
    """

    settings: PruneSettings
    rules: LayoutRules
    window: int
    windows: int
    source: str
    device: torch.device
    budget: Budget


def prepare(model: Model, options: PruneOptions) -> Prepared:
    """Check the options against the model.

    Raises:
        FrugalBonsaiError: an option that cannot work.
    """
    from frugal_bonsai.bonsai.calibration import window_count
    from frugal_bonsai.bonsai.select import check_reachable
    from frugal_bonsai.memory.budget import find_device, make_budget
    from frugal_bonsai.model.units import KeepMask

    settings = make_settings(options.preset, options.method)
    window = choose_window(model.spec, options.window)
    device = find_device(options.device)
    rules = layout_rules(
        model.spec, options.layout, tile=options.tile, default_tile=DEFAULT_TILE[device.type]
    )
    check_reachable(
        KeepMask(model.spec.table), settings.sparsity, rules, model.spec.block_parameters
    )
    default_source = EXAMPLE_SOURCE if model.name == "example" else DEFAULT_SOURCE
    return Prepared(
        settings=settings,
        rules=rules,
        window=window,
        windows=window_count(window, options.windows),
        source=options.calibration or default_source,
        device=device,
        budget=make_budget(device, options.max_gpu_mem, options.max_cpu_mem),
    )


def plan_prune(
    model: Model,
    ready: Prepared,
    windows: int,
    *,
    eval_windows: int = 0,
    custom_utility: bool = False,
) -> MemoryPlan:
    """The memory plan of a prepared prune.

    Args:
        model: what is pruned.
        ready: the prune.
        windows: of calibration.
        eval_windows: of the text whose perplexity is reported.
        custom_utility: the utility needs all logits of a window.

    Raises:
        BudgetError: nothing fits.
    """
    from frugal_bonsai.bonsai.calibration import held_out_count

    settings = ready.settings
    native_windows = max(held_out_count(windows), eval_windows)
    mask_windows = min(settings.mask_windows, windows)
    pairs = 0 if settings.method == "local" else mask_windows * (settings.masks + 1)
    work = Work(
        window=ready.window,
        windows=windows,
        pairs=pairs,
        native_windows=native_windows,
        windows_per_mask=mask_windows if settings.design == "shared" else 1,
        gram=settings.recovery or settings.prior == "exact",
        recovery=settings.recovery,
        refit_inputs=settings.recovery and settings.refit == "all",
        weights=settings.weights,
        full_logits=custom_utility,
        rewrite=True,
        store_copies=2,
        sampled=sampled_windows(ready),
    )
    base = measured_base_bytes(model.spec, int8=settings.weights == "int8")
    return plan_memory(model.spec, ready.budget, work, base_bytes=base)


def expected_tokens(settings: PruneSettings, window: int, windows: int) -> tuple[int, int, int]:
    """(rounds, forward tokens, of these with Gram matrices) that a prune will spend at most."""
    rounds = math.ceil(settings.sparsity / settings.step - 1e-9)
    mask_windows = min(settings.mask_windows, windows)
    masked = 0 if settings.method == "local" else mask_windows * (settings.masks + 1)
    calibration = windows * window
    each = 2 * calibration if settings.recovery else calibration
    statistics = calibration if settings.recovery else 0
    gram = (rounds + 1) * calibration
    return rounds, statistics + rounds * (each + masked * window), gram


def plan(model: str, options: PruneOptions) -> dict[str, Any]:
    """What a prune would hold and how long it would take, as plain values."""
    with open_model(model) as opened:
        ready = prepare(opened, options)
        memory = plan_prune(opened, ready, ready.windows)
        return describe_plan(opened, ready, memory, ready.windows)


def describe_plan(
    model: Model, ready: Prepared, memory: MemoryPlan, windows: int
) -> dict[str, Any]:
    """A memory plan and its time estimate as plain values."""
    from frugal_bonsai.memory.hardware import estimate_time, measure_profile
    from frugal_bonsai.stream.engine import compute_dtype

    file = next(iter(model.checkpoint.tensors.values())).file
    profile = measure_profile(model.spec, ready.device, compute_dtype(ready.device), file)
    rounds, tokens, gram = expected_tokens(ready.settings, ready.window, windows)
    one_store = memory.total_bytes("disk") // 2
    waves = math.ceil(
        min(ready.settings.mask_windows, windows)
        * (ready.settings.masks + 1)
        / memory.limits.windows_in_flight
    )
    estimate = estimate_time(
        profile,
        model.spec,
        window=ready.window,
        forward_tokens=tokens,
        gram_tokens=gram,
        sweeps=1 + rounds * (waves + 2 * int(ready.settings.recovery)),
        stores=1 + rounds * (1 + int(ready.settings.recovery)),
        store_bytes=one_store,
    )
    notes = list(ready.budget.notes)
    if ready.source == SELF:
        notes.append(_sampling_note(model, ready, profile))
    return {
        "model": model.name,
        "family": model.spec.family.model_type,
        "device": ready.device.type,
        "device_name": profile.name,
        "window": ready.window,
        "windows": windows,
        "micro_batch": memory.limits.micro_batch,
        "windows_in_flight": memory.limits.windows_in_flight,
        "concurrent_masks": memory.concurrent_masks,
        "rounds": rounds,
        "forward_tokens": tokens,
        "seconds": {
            "sweeps": estimate.sweeps_seconds,
            "stores": estimate.stores_seconds,
            "total": estimate.total_seconds,
        },
        "binds": estimate.binds,
        "items": plan_items(memory),
        "totals": {where: memory.total_bytes(where) for where in ("host", "gpu", "disk")},
        "caps": {"host": ready.budget.host_bytes, "gpu": ready.budget.gpu_bytes},
        "binding": memory.binding.name,
        "peak_phases": {where: memory.peak_phase(where).name for where in ("host", "gpu")},
        "phases": plan_phases(memory),
        "notes": notes,
        "profile": profile.source,
    }


def plan_phases(memory: MemoryPlan) -> list[dict[str, Any]]:
    """What each phase holds, as plain values."""
    return [
        {
            "name": phase.name,
            "host_bytes": phase.total_bytes("host"),
            "gpu_bytes": phase.total_bytes("gpu"),
        }
        for phase in memory.phases
    ]


def plan_items(memory: MemoryPlan) -> list[dict[str, Any]]:
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


def sampling_note(model: Model, ready: Prepared) -> str:
    """How long ``self`` samples its windows, for who is about to wait for it."""
    from frugal_bonsai.memory.hardware import measure_profile
    from frugal_bonsai.stream.engine import compute_dtype

    file = next(iter(model.checkpoint.tensors.values())).file
    return _sampling_note(
        model, ready, measure_profile(model.spec, ready.device, compute_dtype(ready.device), file)
    )


def _sampling_note(model: Model, ready: Prepared, profile: HardwareProfile) -> str:
    from frugal_bonsai.report.words import duration

    sweeps, count = ready.window - 1, sampled_windows(ready)
    disk = sweeps * model.checkpoint.weight_bytes / profile.disk_bytes_per_second
    compute = sweeps * count * 2 * model.spec.parameters / profile.flops
    calls = sweeps * model.spec.layers * _LAYER_CALL_SECONDS
    return (
        f"{count} windows of {ready.window} tokens are sampled from the model first: {sweeps} "
        f"sweeps over all its layers, one a token, about {duration(max(disk, compute + calls))}"
    )


def sampled_windows(ready: Prepared) -> int:
    """Windows that ``self`` samples: to search on and to hold out; 0 for other sources."""
    from frugal_bonsai.bonsai.calibration import held_out_count

    return ready.windows + held_out_count(ready.windows) if ready.source == SELF else 0
