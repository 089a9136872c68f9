"""The sparsities that a layout and an allocation can reach.

In: a mask, layout rules, a target. Out: whether another round can bring the mask nearer to the
target, and a refusal of targets that cannot be met. Holds nothing.
"""

from __future__ import annotations

from frugal_bonsai.bonsai.selection.cut import bundle_groups
from frugal_bonsai.bonsai.selection.uniform import is_nearer
from frugal_bonsai.bonsai.settings import EXPERTS, FFN_ALONE, GLOBAL, LAYERS
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.layout import PER_LAYER, LayoutRules
from frugal_bonsai.model.units import FFN, KeepMask, UnitGroup, iterate_layers


def can_go_nearer(
    mask: KeepMask, final_parameters: int, rules: LayoutRules, allocation: str = GLOBAL
) -> bool:
    """Tell whether the layout has legal counts between the present ones and the final target."""
    before = mask.removed_parameters()
    if allocation == EXPERTS:
        return not before  # ranked once, in one round
    if allocation == LAYERS:
        sizes = _layer_sizes(mask)
        return len(sizes) > 1 and is_nearer(before + min(sizes), before, final_parameters)
    steps = {
        group: step
        for group in _allowed_groups(mask, allocation)
        if (step := _next_step(mask, group, rules)) is not None
    }
    if rules.uniform:
        kinds = {group.kind for group in steps}
        together = [sum(s for g, s in steps.items() if g.kind == kind) for kind in kinds]
        return any(is_nearer(before + step, before, final_parameters) for step in together)
    bundles = [[g for g in bundle if g in steps] for bundle in bundle_groups(mask, rules)]
    left = final_parameters - before
    return any(bundle and sum(steps[g] for g in bundle) <= left for bundle in bundles)


def check_reachable(
    mask: KeepMask, sparsity: float, rules: LayoutRules, blocks: int, allocation: str = GLOBAL
) -> None:
    """Refuse a sparsity that the layout cannot hold or the allocation cannot find.

    Raises:
        OptionError: Even the smallest legal counts leave too many parameters, or the layout needs
            equal layers and those of this model differ already.
    """
    _check_equal_layers(mask, rules)
    if allocation == LAYERS:
        _check_layers(mask, sparsity, blocks)
        return
    if allocation == EXPERTS:
        return  # selection/whole.py checks them
    most = 0
    for group in _allowed_groups(mask, allocation):
        smallest = rules.legal_counts(group.kind, group.count)[0]
        most += (group.count - smallest) * group.unit_parameters
    if sparsity * blocks > most:
        whole = ", attention stays whole (--allocation ffn)" if allocation == FFN_ALONE else ""
        raise OptionError(
            f"--sparsity: {sparsity:g} is beyond what the {rules.layout} layout can hold: at most "
            f"{most / blocks:.3f} of the block parameters can go (one unit of each kind stays in "
            f"every layer, FFN tile {rules.tile}{whole})"
        )


def _check_equal_layers(mask: KeepMask, rules: LayoutRules) -> None:
    """Refuse a model with layers of different size where the layout needs equal ones."""
    numbers = mask.experts()
    experts = {numbers[layer] for layer in mask.layers_with(FFN) if numbers}
    if rules.layout != PER_LAYER and len(experts) > 1:
        raise OptionError(
            f"--layout: {rules.layout} keeps the same number of experts in every layer, but this "
            f"model's layers have {min(experts)} to {max(experts)}: it has been pruned already; "
            "take --layout per-layer, or prune the dense model that it was made from"
        )
    for kind in mask.table.kinds:
        counts = {group.count for group in mask.table.groups if group.kind == kind}
        if rules.uniform and len(counts) > 1:
            raise OptionError(
                "--layout: uniform keeps the same number of units in every layer, but this model's "
                f"have {min(counts)} to {max(counts)} {kind} units: it has been pruned already; "
                "take --layout per-layer, or prune the dense model that it was made from"
            )


def _check_layers(mask: KeepMask, sparsity: float, blocks: int) -> None:
    """Refuse a sparsity below half a layer or above all layers but one."""
    sizes = sorted(_layer_sizes(mask))
    least, most = sizes[0] / 2 / blocks, sum(sizes[:-1]) / blocks
    if not least < sparsity <= most:
        raise OptionError(
            f"--sparsity: {sparsity:g} cannot be had from whole layers: one of the {len(sizes)} is "
            f"{sizes[0] / blocks:.3f} of the block parameters, and one layer must stay; ask for "
            f"more than {least:.3f} and at most {most:.3f}"
        )


def _allowed_groups(mask: KeepMask, allocation: str) -> tuple[UnitGroup, ...]:
    """Return the groups that an allocation may take units from."""
    groups = mask.table.groups
    return tuple(g for g in groups if g.kind == FFN) if allocation == FFN_ALONE else groups


def _layer_sizes(mask: KeepMask) -> list[int]:
    """Return the parameters of the units of each layer that stays."""
    layers = [
        sum(mask.kept(group) * group.unit_parameters for group in groups)
        for _, groups in iterate_layers(mask.table)
    ]
    return [size for size in layers if size]


def _next_step(mask: KeepMask, group: UnitGroup, rules: LayoutRules) -> int | None:
    """Return the parameters that go at the group's next legal count; None at the smallest one."""
    alive = mask.kept(group)
    lower = [c for c in rules.legal_counts(group.kind, group.count) if c < alive]
    return (alive - max(lower)) * group.unit_parameters if lower else None
