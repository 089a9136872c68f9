"""The cut: the units that go this round, within the limits of the output layout.

In: one :class:`~frugal_bonsai.bonsai.selection.curves.Curve` per group. Out: the mask of the units
that stay. All methods share this selection: masks give fitted curves, a method without masks gives
the running sums of its scores. The uniform layout's cut is in uniform.py. Holds one number per
candidate.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Mapping, Sequence

import torch

from frugal_bonsai.bonsai.selection.curves import Curve, withhold
from frugal_bonsai.bonsai.selection.schedule import LATER_STEP, Schedule
from frugal_bonsai.bonsai.selection.uniform import cut_uniform
from frugal_bonsai.bonsai.settings import (
    EQUAL,
    FFN_ALONE,
    GLOBAL,
    LATENCY,
    PARAMETERS,
    UNITS,
)
from frugal_bonsai.model.layout import PER_LAYER, LayoutRules
from frugal_bonsai.model.units import ATTENTION, KeepMask, UnitGroup


def cut_round(
    schedule: Schedule, mask: KeepMask, curves: tuple[Curve, ...]
) -> tuple[KeepMask, int]:
    """Cut by curves to the goal of the next round.

    Returns:
        The new mask, unchanged if the layout leaves nothing to remove, and the parameters that it
        aimed to have removed in all.
    """
    settings, goal = schedule.settings, schedule.goal(mask)
    while True:
        target = round(goal * schedule.blocks)
        cut_mask = cut(
            mask,
            curves,
            target,
            schedule.rules,
            final_parameters=schedule.final_parameters,
            objective=settings.objective,
            latency=schedule.latency,
            allocation=settings.allocation,
        )
        if cut_mask != mask or goal >= settings.sparsity:
            return cut_mask, target
        # The layout's next legal size may be farther away than one step.
        goal = min(goal + (settings.step or LATER_STEP), settings.sparsity)


def cut(
    mask: KeepMask,
    curves: tuple[Curve, ...],
    target_parameters: int,
    rules: LayoutRules,
    *,
    final_parameters: int | None = None,
    objective: str = PARAMETERS,
    latency: Mapping[str, float] | None = None,
    allocation: str = GLOBAL,
) -> KeepMask:
    """Remove the cheapest units until ``target_parameters`` of the dense blocks are gone.

    Args:
        mask: Units alive.
        curves: One per group, in table order.
        target_parameters: Parameters removed in all, those of earlier rounds included.
        rules: Rules of the output layout.
        final_parameters: Parameters removed after the last round. A step larger than this round's
            share (attention in the uniform layout) may not pass it. None means the target.
        objective: Divisor of the loss in the ``per-layer`` layout: ``parameters``, or ``units`` as
            in the published code, where a KV group competes with a channel whatever its size. With
            ``latency`` both layouts divide by milliseconds.
        latency: Milliseconds of one unit of each kind, for ``latency``.
        allocation: ``equal`` and ``ffn`` take from the group with the smallest removed share; the
            loss breaks ties.

    Returns:
        A new mask. ``per-layer``: at most the target, and short of it by less than the finest step.
        ``uniform``: the legal size nearest to it.
    """
    if allocation == FFN_ALONE:
        curves = withhold(curves, ATTENTION)
    equal = allocation in (EQUAL, FFN_ALONE)
    sizes = _unit_sizes(curves, objective, latency, uniform=rules.uniform)
    if rules.uniform:
        final = target_parameters if final_parameters is None else final_parameters
        return cut_uniform(mask, curves, sizes, target_parameters, final, rules, equal=equal)
    return _cut_per_layer(mask, curves, sizes, target_parameters, rules, equal=equal)


def _unit_sizes(
    curves: tuple[Curve, ...],
    objective: str,
    latency: Mapping[str, float] | None,
    *,
    uniform: bool,
) -> list[float]:
    """Return the divisor of the loss of one unit of each curve."""
    if objective == LATENCY:
        assert latency is not None
        return [latency[curve.group.kind] for curve in curves]
    if objective == UNITS and not uniform:
        return [1] * len(curves)
    return [curve.group.unit_parameters for curve in curves]


def _cut_per_layer(
    mask: KeepMask,
    curves: tuple[Curve, ...],
    sizes: list[float],
    target_parameters: int,
    rules: LayoutRules,
    *,
    equal: bool,
) -> KeepMask:
    """Take one legal step of one group at a time, the lowest marginal loss per size first.

    With ``equal`` the group with the smallest share removed comes first, so that shares rise
    together.
    """
    left = target_parameters - mask.removed_parameters()
    bundles = [[mask.table.position(g) for g in groups] for groups in bundle_groups(mask, rules)]
    groups = [curves[bundle[0]].group for bundle in bundles]
    legal = [rules.legal_counts(group.kind, group.count) for group in groups]
    alive = [mask.kept(group) for group in groups]
    losses = [_sum_losses([curves[i] for i in bundle]) for bundle in bundles]
    size_of = [sum(sizes[i] for i in bundle) for bundle in bundles]
    taken = [0] * len(bundles)
    heap: list[tuple[float, float, int, int]] = []

    def offer(at: int) -> None:
        count = _next_count(legal[at], alive[at], taken[at], len(losses[at]) - 1)
        if count is None:
            return
        gone = count - taken[at]
        cost = losses[at][count] - losses[at][taken[at]]
        share = 1 - (alive[at] - count) / groups[at].count if equal else 0.0
        heapq.heappush(heap, (share, cost / (gone * size_of[at]), at, gone))

    for at in range(len(bundles)):
        offer(at)
    while heap and left > 0:
        _, _, at, gone = heapq.heappop(heap)
        parameters = gone * sum(curves[i].group.unit_parameters for i in bundles[at])
        if parameters > left:
            continue  # finer steps fill what is left
        taken[at] += gone
        left -= parameters
        offer(at)
    chosen = [
        curves[i].order[:count]
        for bundle, count in zip(bundles, taken, strict=True)
        for i in bundle
    ]
    return mask.without(torch.cat(chosen))


def _sum_losses(curves: list[Curve]) -> list[float]:
    """Return the loss after removing the first k units of each curve, up to the shortest one."""
    most = min(len(curve.loss) for curve in curves)
    loss: list[float] = torch.stack([curve.loss[:most] for curve in curves]).sum(0).tolist()
    return loss


def bundle_groups(mask: KeepMask, rules: LayoutRules) -> list[list[UnitGroup]]:
    """Return the sets of groups that lose equally many units together.

    Every group is a set by itself, except for the experts of a layer in the ``per-layer`` layout:
    transformers holds them in one tensor, so they stay equally wide. Each expert still loses the
    units that are least important in itself.
    """
    bundles: dict[tuple[int, str, int | None], list[UnitGroup]] = {}
    for group in mask.table.groups:
        if group.expert is not None and not mask.kept(group):
            continue  # the whole expert is gone
        apart = None if rules.layout == PER_LAYER else group.expert
        bundles.setdefault((group.layer, group.kind, apart), []).append(group)
    return list(bundles.values())


def _next_count(legal: Sequence[int], alive: int, taken: int, most: int) -> int | None:
    """Return the units gone at the next legal count; None beyond the last candidate."""
    below = bisect_left(legal, alive - taken)
    count = alive - legal[below - 1] if below else None
    return None if count is None or count > most else count
