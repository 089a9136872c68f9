"""Drop whole layers or whole experts, the least important first.

In: the remaining units, a score per unit that is the same within a layer or an expert, and a
target. Out: a mask. Layers and experts are ranked once: removing one changes the inputs of the
others, and the published methods (ShortGPT, Men et al. 2024; REAP, Lasby et al. 2025) do not
measure again. Each layer loses the same number of experts, because scores of different layers are
not comparable. Tokens of a dropped expert are routed to others. Memory: one mask for each count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from frugal_bonsai.bonsai.settings import LAYERS, PruneSettings
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import KeepMask, UnitGroup, iterate_layers


def drop_whole(
    mask: KeepMask, score_N: torch.Tensor, settings: PruneSettings, spec: ModelSpec
) -> tuple[KeepMask, str]:
    """Drop whole layers or experts, as the allocation says.

    Args:
        mask: the remaining units.
        score_N: score of each unit's layer or expert.
        settings: settings of the prune.
        spec: the dense model.

    Returns:
        The new mask and a sentence on it for the user.
    """
    target, what = round(settings.sparsity * spec.block_parameters), settings.allocation
    if what == LAYERS:
        after = drop_layers(mask, score_N, target)
        dropped = ", ".join(map(str, after.dropped_layers()))
        gone = f"layers {dropped} of {spec.layers} (counted from 0) are dropped"
    else:
        after = drop_experts(mask, score_N, target, spec)
        count = max(len(after.dropped_experts(layer)) for layer in range(spec.layers))
        gone = f"{count} of {spec.experts} experts of every layer are dropped"
    share = after.removed_parameters() / spec.block_parameters
    return after, f"{gone}, {share:.1%}: the number of {what} nearest to {settings.sparsity:.1%}"


def drop_layers(mask: KeepMask, score_N: torch.Tensor, target_parameters: int) -> KeepMask:
    """Drop the least important layers; their number comes nearest to the target.

    Args:
        mask: the remaining units.
        score_N: score of each unit's layer.
        target_parameters: removed parameters of the dense model, those of ``mask`` included.
    """
    scores = {
        group.layer: _score(mask, score_N, group) for group in mask.table.groups if mask.kept(group)
    }
    order = sorted(scores, key=lambda layer: (scores[layer], layer))
    masks = [mask.without_layers(order[:count]) for count in range(len(order))]
    return _nearest(masks, target_parameters)


def drop_experts(
    mask: KeepMask, score_N: torch.Tensor, target_parameters: int, spec: ModelSpec
) -> KeepMask:
    """Drop the least important experts; the number per layer comes nearest to the target.

    Where the router chooses among groups, each group loses the same number.

    Args:
        mask: the remaining units.
        score_N: score of each unit's expert.
        target_parameters: removed parameters of the dense model, those of ``mask`` included.
        spec: the dense model.
    """
    order = [
        _least_first(mask, score_N, experts, spec.expert_groups)
        for _, groups in iterate_layers(mask.table)
        if (experts := _experts(mask, groups))
    ]
    masks = []
    for count in range(0, min(map(len, order)) - spec.least_experts + 1, spec.expert_groups):
        keep_N = mask.keep_N.clone()
        for experts in order:
            for group in experts[:count]:
                keep_N[mask.table.span(group)] = False
        masks.append(KeepMask(mask.table, keep_N))
    return _nearest(masks, target_parameters)


def _least_first(
    mask: KeepMask, score_N: torch.Tensor, experts: Sequence[UnitGroup], groups: int
) -> list[UnitGroup]:
    """Return a layer's experts by score: the first of each group of the router, the second, ..."""
    own = len(experts) // groups
    ordered = [
        sorted(experts[at : at + own], key=lambda g: (_score(mask, score_N, g), g.expert))
        for at in range(0, len(experts), own)
    ]
    return [group for rank in zip(*ordered, strict=True) for group in rank]


def check_experts(mask: KeepMask, sparsity: float, spec: ModelSpec) -> None:
    """Check that dropping whole experts can reach the sparsity.

    Args:
        mask: the remaining units.
        sparsity: share of the block parameters that is to be removed.
        spec: the dense model.

    Raises:
        OptionError: the model has no experts, or the sparsity is less than half of one expert a
            layer or more than all that can go.
    """
    if not mask.table.has_experts:
        raise OptionError("--allocation experts: this model's layers have no experts; leave it out")
    one_each = {
        group.layer: group.count * group.unit_parameters + group.joint_parameters
        for group in _experts(mask, mask.table.groups)
    }
    zeros_N, blocks = torch.zeros(mask.table.units), spec.block_parameters
    least, groups = spec.least_experts, spec.expert_groups
    one, most = (
        drop_experts(mask, zeros_N, target, spec).removed_parameters() / blocks
        for target in (groups * sum(one_each.values()), blocks)
    )
    if not one / 2 < sparsity <= most:
        step = "one expert" if groups == 1 else f"{groups} experts (one of each group)"
        raise OptionError(
            f"--sparsity: {sparsity:g} cannot be had from whole experts: {step} of every layer "
            f"is {one:.3f} of the block parameters, and {'one expert' if least == 1 else least} "
            f"must stay; ask for more than {one / 2:.3f} and at most {most:.3f}"
        )


def _experts(mask: KeepMask, groups: Sequence[UnitGroup]) -> list[UnitGroup]:
    """Return the groups that are remaining experts."""
    return [group for group in groups if group.expert is not None and mask.kept(group)]


def _score(mask: KeepMask, score_N: torch.Tensor, group: UnitGroup) -> float:
    return float(score_N[mask.table.span(group)][mask.of(group)].mean())


def _nearest(masks: Sequence[KeepMask], target_parameters: int) -> KeepMask:
    return min(masks, key=lambda mask: abs(mask.removed_parameters() - target_parameters))
