"""``plan``: what a prune would hold in memory and how long it would take; runs nothing.

In: a model and options. Out: a :class:`Prepared` prune, of which ``prune`` runs the rest, and the
plan as plain values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from frugal_bonsai.bonsai.settings import (
    REFINE_ITERATIONS,
    TRIAL_SHARE,
    PruneSettings,
    make_settings,
    round_windows,
)
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.items import LEAST_CHANNELS, MOST_BLOCKS
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
    model: Model, ready: Prepared, windows: int, *, custom_utility: bool = False
) -> MemoryPlan:
    """The memory plan of a prepared prune.

    Raises:
        BudgetError: nothing fits.
    """
    settings = ready.settings
    mask_windows = min(settings.mask_windows, windows)
    pairs = 0 if settings.method == "local" else mask_windows * (settings.masks + 1)
    work = Work(
        window=ready.window,
        windows=windows,
        pairs=pairs,
        windows_per_mask=mask_windows if settings.design == "shared" else 1,
        gram=settings.recovery or settings.prior == "exact",
        recovery=settings.recovery,
        refit_inputs=settings.recovery and settings.refit == "all",
        refine=settings.recovery and settings.refine > 0,
        stand_ins=_stand_in_share(settings, uniform=ready.rules.uniform),
        weights=settings.weights,
        full_logits=custom_utility,
        store_copies=2,
    )
    base = measured_base_bytes(model.spec, int8=settings.weights == "int8")
    return plan_memory(model.spec, ready.budget, work, base_bytes=base)


def _stand_in_share(settings: PruneSettings, *, uniform: bool) -> float:
    """Of a group's alive units, in the last round, whose pool is the largest share."""
    if not settings.stand_ins(uniform=uniform):
        return 0.0
    alive = 1 - settings.sparsity + settings.step
    return min(1.0, settings.pool * settings.step / max(alive, settings.step))


def expected_tokens(
    settings: PruneSettings, columns: int, window: int, windows: int, *, uniform: bool
) -> tuple[int, int, int]:
    """(rounds, forward tokens, of these with Gram matrices) that a prune will spend at most."""
    rounds = math.ceil(settings.sparsity / settings.step - 1e-9)
    mask_windows = min(settings.mask_windows, windows)
    masked = 0 if settings.method == "local" else mask_windows * (settings.masks + 1)
    calibration = windows * window
    part = round_windows(settings, columns, window, windows) * window
    if not settings.recovery:
        return rounds, rounds * (part + masked * window), (rounds + 1) * part
    # Refining passes through the FFN there and back: most of a layer's weights, those that stay.
    blocks = min(MOST_BLOCKS, -(-columns // LEAST_CHANNELS))
    refining = (1 + blocks + 2 * REFINE_ITERATIONS + settings.refine) * (1 - settings.sparsity)
    refining *= settings.refine > 0
    tried = 0 if uniform or not settings.trial else 4 * math.ceil(TRIAL_SHARE * part)
    tokens = part + rounds * (masked * window + tried) + (rounds - 1) * 2 * part
    gram = rounds * (part + tried // 2) + calibration
    return rounds, tokens + round((2 + refining) * calibration), gram


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
    columns = max(group.columns for group in model.spec.table.groups)
    profile = measure_profile(model.spec, ready.device, compute_dtype(ready.device), file)
    rounds, tokens, gram = expected_tokens(
        ready.settings, columns, ready.window, windows, uniform=ready.rules.uniform
    )
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
    if ready.source == "self":
        notes.append(
            f"calibration text is sampled from the model first: {ready.window - 1} sweeps over "
            f"all layers, about {_sampling_seconds(profile, model, one_store, ready.window):.0f} s"
        )
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
        "notes": notes,
        "profile": profile.source,
    }


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


def _sampling_seconds(profile: Any, model: Model, store_bytes: int, window: int) -> float:
    # Sampling streams the checkpoint in its own precision, about twice the int8 store.
    return float(window * 2 * store_bytes / profile.disk_bytes_per_second)
