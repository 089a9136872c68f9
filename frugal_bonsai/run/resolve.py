"""From a user's options to the settings of one prune.

In: an open model, options. Out: a :class:`ResolvedPrune`, frozen: nothing decides on settings
after it. Refuses what cannot work before text or weights are read; writes configs to a temporary
folder, to see whether a layout can hold the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from frugal_bonsai.accelerator import is_accelerator
from frugal_bonsai.bonsai.calibration import window_count
from frugal_bonsai.bonsai.methods import make_settings
from frugal_bonsai.bonsai.selection.reach import check_reachable
from frugal_bonsai.bonsai.selection.whole import check_experts
from frugal_bonsai.bonsai.settings import EXPERTS, LATENCY, LAYERS, PruneSettings
from frugal_bonsai.errors import OptionError
from frugal_bonsai.hardware.latency import LatencyModel
from frugal_bonsai.hardware.profile import INT8, HardwareProfile
from frugal_bonsai.hardware.throughput import LayerOperations, int8_wins
from frugal_bonsai.model.biases import require_output_biases
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import LayoutRules, layout_rules
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.layouts import WRITE_CONFIG
from frugal_bonsai.rewrite.layouts.mistral import as_mistral
from frugal_bonsai.rewrite.layouts.widths import shared_config
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
_REFIT = (
    "the experts' down_proj, and attention's projections, are refitted; gate_proj, up_proj and the "
    "router stay as they are (--refit all and --refine do not reach into experts)"
)


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
    notes = _check_method(settings, options.settings, spec, profiled=profiled)
    window = choose_window(spec, options.window)
    machine = find_machine(options, elsewhere=elsewhere)
    rules = layout_rules(
        spec,
        options.layout,
        tile=options.tile,
        default_tile=GPU_TILE if is_accelerator(machine.device) else CPU_TILE,
        as_mistral=options.as_mistral,
    )
    _check_layout(settings, rules, spec)
    rates = machine.rates  # measured first: what it frees serves the rest of the command
    operations = count_operations(spec, window, compute_dtype(machine.device))
    settings = replace(
        settings,
        refine=0 if spec.experts else settings.refine,
        self_windows=_self_windows(settings, options.source_for(model.name), begun or {}),
        arithmetic=_arithmetic(settings, operations, rates, begun or {}),
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
        saved = begun.get("self_windows")  # the state's own check follows
        return saved if isinstance(saved, int) else None
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


def _check_method(
    settings: PruneSettings, given: Mapping[str, Any], spec: ModelSpec, *, profiled: bool
) -> tuple[str, ...]:
    """Check that a method supports this model.

    A setting of the method's own that the model does not support is ignored, where one that the
    user has given is refused.

    Returns:
        Notes about settings without effect.

    Raises:
        OptionError: The model does not support what the user asks for.
    """
    if settings.objective == LATENCY and not profiled:
        raise OptionError(
            "--objective latency: needs the rates of the machine that the model is for; measure "
            "this one with frugal-bonsai profile --out FILE, then add --profile FILE"
        )
    if settings.bias:
        require_output_biases(spec)
    if settings.allocation == LAYERS and spec.whole_layers is not None:
        raise OptionError(
            f"--method depth: a {spec.family.model_type} keeps its layers, because "
            f"{spec.whole_layers}; take another --method"
        )
    if not spec.experts:
        if settings.allocation == EXPERTS:
            raise OptionError(
                f"--allocation experts: the layers of a {spec.family.model_type} have no experts; "
                "leave it out, or take another --method"
            )
        return ()
    reason = None if spec.family.experts is None else spec.family.experts.whole_channels
    if reason is not None and settings.allocation not in (EXPERTS, LAYERS):
        raise OptionError(
            f"--method: the experts of a {spec.family.model_type} keep their channels, {reason}; "
            "take --method experts, which removes whole experts, or --method depth"
        )
    if given.get("refine"):
        raise OptionError(
            f"--refine {given['refine']}: moves the channels of one FFN, a "
            f"{spec.family.model_type} has {spec.experts} experts a layer; leave it out"
        )
    if settings.objective == LATENCY:
        raise OptionError(
            "--objective latency: what a channel costs depends on how often its expert is chosen, "
            f"which the profile of a machine does not say; leave it out for a "
            f"{spec.family.model_type}"
        )
    return (_REFIT,) if settings.recovery else ()


def _check_layout(settings: PruneSettings, rules: LayoutRules, spec: ModelSpec) -> None:
    """Check that a layout can hold this model, pruned to the target sparsity.

    The config is written for the whole model, to see whether the architecture accepts it.

    Raises:
        OptionError: The layout cannot hold the counts, or belongs to another family.
        UnsupportedModelError: transformers has no model for it.
    """
    if rules.as_mistral and settings.bias:
        raise OptionError("--as-mistral: a Mistral has no biases; leave it or --bias out")
    whole = KeepMask(spec.table)
    check_reachable(whole, settings.sparsity, rules, spec.block_parameters, settings.allocation)
    if settings.allocation == EXPERTS:
        check_experts(whole, settings.sparsity, spec)
    if rules.as_mistral:
        as_mistral(spec, shared_config(spec))
    with tempfile.TemporaryDirectory() as folder:
        WRITE_CONFIG[rules.layout](spec, whole, rules, Path(folder))
