"""From a user's options to the settings of one prune.

In: an open model, options. Out: a :class:`ResolvedPrune`, frozen: nothing decides on settings
after it. Refuses what cannot work before text or weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from frugal_bonsai.accelerator import is_accelerator
from frugal_bonsai.bonsai.calibration import window_count
from frugal_bonsai.bonsai.methods import make_settings
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.errors import OptionError
from frugal_bonsai.hardware.latency import LatencyModel
from frugal_bonsai.hardware.profile import INT8, HardwareProfile
from frugal_bonsai.hardware.throughput import LayerOperations, int8_wins
from frugal_bonsai.model.layout import LayoutRules, layout_rules
from frugal_bonsai.run.compatibility import check_layout, check_method
from frugal_bonsai.run.machine import Machine, find_machine
from frugal_bonsai.run.open import Model
from frugal_bonsai.run.options import PruneOptions
from frugal_bonsai.run.texts import choose_window
from frugal_bonsai.sizes import parse_bytes
from frugal_bonsai.stream.engine import compute_dtype
from frugal_bonsai.stream.operations import count_operations
from frugal_bonsai.text.sources import SELF

# FFN tiles that matrix products are fast with.
CPU_TILE, GPU_TILE = 64, 128
AUTO, FLOAT_PRODUCTS, INT8_PRODUCTS = "auto", "float", "int8"


@dataclass(frozen=True, kw_only=True)
class ResolvedPrune:
    """A prune of one model on one machine, decided but not begun.

    Attributes:
        method: Name of the method.
        settings: Settings of the method, every ``auto`` decided.
        rules: Rules of the layout.
        window: Tokens of a window (S).
        windows: Number of calibration windows, if the text has as many.
        source: Calibration source, as named.
        machine: Device, caps and rates.
        operations: Operations of the model's mean layer.
        shard_bytes: Largest number of tensor bytes in a shard of the output.
        latency: Latency of the model on the profile's machine. None without a profile.
        notes: Notes about settings that have no effect on this model.
    """

    method: str
    settings: PruneSettings
    rules: LayoutRules
    window: int
    windows: int
    source: str
    machine: Machine
    operations: LayerOperations
    shard_bytes: int
    latency: LatencyModel | None = None
    notes: tuple[str, ...] = ()


def resolve(
    model: Model,
    options: PruneOptions,
    *,
    elsewhere: bool = False,
    begun: Mapping[str, Any] | None = None,
) -> ResolvedPrune:
    """Resolve the options of a prune, and check them against the model.

    Args:
        model: The model.
        options: The user's options.
        elsewhere: Plan for the machine of the profile; no device here is asked.
        begun: Settings of the run that is resumed.

    Raises:
        FrugalBonsaiError: An option cannot work.
    """
    spec = model.spec
    settings = make_settings(options.method, options.settings)
    profiled = options.profile is not None
    notes = check_method(settings, options.settings, spec, profiled=profiled)
    window = choose_window(spec, options.window)
    machine = find_machine(options, elsewhere=elsewhere)
    rules = layout_rules(
        spec,
        options.layout,
        tile=options.tile,
        default_tile=GPU_TILE if is_accelerator(machine.device) else CPU_TILE,
        as_mistral=options.as_mistral,
    )
    check_layout(settings, rules, spec)
    operations = count_operations(spec, window, compute_dtype(machine.device))
    settings = replace(
        settings,
        refine=0 if spec.experts else settings.refine,
        self_windows=_self_windows(settings, options.source_for(model.name), begun or {}),
        arithmetic=_arithmetic(settings, operations, machine.rates, begun or {}),
    )
    profile, lengths = machine.profile, (settings.prompt_tokens, settings.generated_tokens)
    return ResolvedPrune(
        method=options.method,
        settings=settings,
        rules=rules,
        window=window,
        windows=window_count(window, options.windows),
        source=options.source_for(model.name),
        machine=machine,
        operations=operations,
        shard_bytes=parse_bytes(options.max_shard_size, option="--max-shard-size"),
        latency=None if profile is None else LatencyModel(spec, operations, profile, *lengths),
        notes=notes,
    )


def _self_windows(settings: PruneSettings, source: str, begun: Mapping[str, Any]) -> int | None:
    """Return the number of windows that the dense model writes; None leaves it to the plan.

    A calibration text that the model wrote needs no more of the same. A run that is resumed keeps
    the number that it began with, whatever fits now.
    """
    if not settings.recovery or (settings.self_windows is None and source == SELF):
        return 0
    if settings.self_windows is None:
        return begun.get("self_windows")
    return settings.self_windows


def _arithmetic(
    settings: PruneSettings,
    operations: LayerOperations,
    rates: HardwareProfile,
    begun: Mapping[str, Any],
) -> str:
    """Return the arithmetic of masked evaluation, ``"float"`` or ``"int8"``.

    ``auto`` takes int8 products where the machine's rates say that they are faster for this model.
    A run that is resumed keeps the arithmetic that it began with, whatever the rates are now.

    Raises:
        OptionError: The user asks for int8 products, and the device has none.
    """
    wanted = settings.arithmetic
    if wanted == AUTO:
        wanted = begun.get("arithmetic", AUTO)
    if wanted == FLOAT_PRODUCTS or settings.weights != "int8":
        return FLOAT_PRODUCTS
    if wanted == INT8_PRODUCTS and INT8 not in rates.products:
        raise OptionError(
            f"--arithmetic int8: torch multiplies no int8 matrices on {rates.name}; use float"
        )
    faster = wanted == INT8_PRODUCTS or int8_wins(operations, rates)
    return INT8_PRODUCTS if faster else FLOAT_PRODUCTS
