"""The cut: which units go this round, within what the output layout can hold.

In: for every group an order of its candidates and a curve: the predicted loss after removing the
first k of them. Out: flat indices of the units that go. One selection serves every method: a unit
regression gives curves by summing relevances in ascending order, a group regression gives them
directly, without masks it is the prior's. Holds one number a candidate.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.settings import (
    EQUAL,
    EXPERTS,
    FFN_ALONE,
    GLOBAL,
    LATENCY,
    LAYERS,
    PARAMETERS,
    UNITS,
)
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.layout import PER_LAYER, LayoutRules
from frugal_bonsai.model.units import ATTENTION, FFN, KeepMask, UnitGroup, iterate_layers


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a group's removal costs.

    Attributes:
        group: the group.
        order: candidates as flat unit indices, first to go first, int64 ``[P]``.
        loss: predicted loss increase after removing the first k, float64 ``[P+1]``.
    """

    group: UnitGroup
    order: torch.Tensor
    loss: torch.Tensor


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
        mask: units alive.
        curves: one for each group, in table order.
        target_parameters: parameters removed in all, earlier rounds included.
        rules: of the output layout.
        final_parameters: what the last round will have removed; a step that is larger than this
            round's share (attention, in the uniform layout) may not pass it. The target, if None.
        objective: ``per-layer`` orders by loss per parameter, or per unit as the published code
            does: there a KV group competes with a channel, however many parameters it has; both
            layouts order by loss per millisecond for ``latency``.
        latency: milliseconds of one unit of each kind, for ``latency``.
        allocation: ``equal`` and ``ffn`` take from the group of which the smallest share is gone,
            the loss decides between equals.

    Returns:
        A new mask. ``per-layer``: at most the target, short of it by less than the finest step;
        ``uniform``: the legal size nearest to it.
    """
    if allocation == FFN_ALONE:
        curves = withhold(curves, ATTENTION)
    equal = allocation in (EQUAL, FFN_ALONE)
    sizes = _unit_sizes(curves, objective, latency, uniform=rules.uniform)
    if rules.uniform:
        final = target_parameters if final_parameters is None else final_parameters
        return _cut_uniform(mask, curves, sizes, target_parameters, final, rules, equal=equal)
    return _cut_per_layer(mask, curves, sizes, target_parameters, rules, equal=equal)


def _unit_sizes(
    curves: tuple[Curve, ...],
    objective: str,
    latency: Mapping[str, float] | None,
    *,
    uniform: bool,
) -> list[float]:
    """What the loss of a unit of each curve is divided by."""
    if objective == LATENCY:
        assert latency is not None
        return [latency[curve.group.kind] for curve in curves]
    if objective == UNITS and not uniform:
        return [1] * len(curves)
    return [curve.group.unit_parameters for curve in curves]


def withhold(curves: tuple[Curve, ...], kind: str) -> tuple[Curve, ...]:
    """The same curves, of which those of one kind offer nothing."""
    return tuple(
        Curve(group=c.group, order=c.order[:0], loss=c.loss[:1]) if c.group.kind == kind else c
        for c in curves
    )


def _cut_per_layer(
    mask: KeepMask,
    curves: tuple[Curve, ...],
    sizes: list[float],
    target_parameters: int,
    rules: LayoutRules,
    *,
    equal: bool,
) -> KeepMask:
    """Greedy by marginal loss per size of a unit, one legal step of one group at a time.

    ``equal``: by the share of the group that would be gone first, so that shares rise together.
    """
    left = target_parameters - mask.removed_parameters()
    bundles = [[mask.table.position(g) for g in groups] for groups in _bundles(mask, rules)]
    groups = [curves[bundle[0]].group for bundle in bundles]
    legal = [rules.legal_counts(group.kind, group.count) for group in groups]
    alive = [mask.kept(group) for group in groups]
    losses = [_loss_together([curves[i] for i in bundle]) for bundle in bundles]
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


def _loss_together(curves: list[Curve]) -> list[float]:
    """Predicted loss after removing the first k of each, as far as all of them go."""
    most = min(len(curve.loss) for curve in curves)
    loss: list[float] = torch.stack([curve.loss[:most] for curve in curves]).sum(0).tolist()
    return loss


def _bundles(mask: KeepMask, rules: LayoutRules) -> list[list[UnitGroup]]:
    """Groups that lose equally many units together: each alone, but for a layer's experts.

    Where layers differ in width transformers holds a layer's experts in one tensor, so that they
    are equally wide; which units each of them loses is its own to say.
    """
    bundles: dict[tuple[int, str, int | None], list[UnitGroup]] = {}
    for group in mask.table.groups:
        if group.expert is not None and not mask.kept(group):
            continue  # gone whole
        apart = None if rules.layout == PER_LAYER else group.expert
        bundles.setdefault((group.layer, group.kind, apart), []).append(group)
    return list(bundles.values())


def _next_count(legal: Sequence[int], alive: int, taken: int, most: int) -> int | None:
    """How many of the order's units are gone at the next legal count, None behind the last one."""
    below = bisect_left(legal, alive - taken)
    count = alive - legal[below - 1] if below else None
    return None if count is None or count > most else count


@dataclass(frozen=True)
class UniformCounts:
    """How many units of each kind stay in every layer, and what that is predicted to cost."""

    attention: int
    ffn: int
    removed_parameters: int
    loss: float


def uniform_options(
    mask: KeepMask, curves: tuple[Curve, ...], target_parameters: int, rules: LayoutRules
) -> list[UniformCounts]:
    """For each legal attention count in reach, the FFN count nearest to the target."""
    by_kind = {kind: [c for c in curves if c.group.kind == kind] for kind in (ATTENTION, FFN)}
    attention, ffn = by_kind[ATTENTION], by_kind[FFN]
    options = []
    for heads in _reach(mask, attention, rules):
        removed_heads = sum((c.group.count - heads) * c.group.unit_parameters for c in attention)
        widths = _reach(mask, ffn, rules)
        removed = {
            width: removed_heads
            + sum((c.group.count - width) * c.group.unit_parameters for c in ffn)
            for width in widths
        }
        width = min(widths, key=lambda w: (abs(removed[w] - target_parameters), w))
        loss = _loss_at(mask, attention, heads) + _loss_at(mask, ffn, width)
        options.append(UniformCounts(heads, width, removed[width], loss))
    return options


def _cut_uniform(
    mask: KeepMask,
    curves: tuple[Curve, ...],
    sizes: list[float],
    target_parameters: int,
    final_parameters: int,
    rules: LayoutRules,
    *,
    equal: bool,
) -> KeepMask:
    """The option that is cheapest for what it removes this round, or takes the kinds alike."""
    before = mask.removed_parameters()
    options = [
        option
        for option in uniform_options(mask, curves, target_parameters, rules)
        if _is_nearer(option.removed_parameters, before, final_parameters)
    ]
    # An attention step may be larger than a round, but does not pass the final target while
    # narrower FFNs can meet it: half a tile is what the nearest legal size may be beyond it.
    half_tile = rules.tile * sum(c.group.unit_parameters for c in curves if c.group.kind == FFN) / 2
    options = [
        o for o in options if o.removed_parameters - final_parameters <= half_tile
    ] or options
    if not options:
        return mask
    if equal:
        whole = {curve.group.kind: curve.group.count for curve in curves}
        best = min(options, key=lambda o: abs(o.attention / whole[ATTENTION] - o.ffn / whole[FFN]))
    else:
        best = min(options, key=lambda o: o.loss / _removed_size(mask, curves, sizes, o))
    chosen = []
    for curve in curves:
        stay = best.attention if curve.group.kind == ATTENTION else best.ffn
        chosen.append(curve.order[: mask.kept(curve.group) - stay])
    return mask.without(torch.cat(chosen))


def _removed_size(
    mask: KeepMask, curves: tuple[Curve, ...], sizes: list[float], option: UniformCounts
) -> float:
    stay = {ATTENTION: option.attention, FFN: option.ffn}
    return sum(
        (mask.kept(c.group) - stay[c.group.kind]) * size
        for c, size in zip(curves, sizes, strict=True)
    )


def _is_nearer(removed: int, before: int, final: int) -> bool:
    """More is gone than before, and not so much that the final target is farther away."""
    return removed > before and removed - final < final - before


def can_go_nearer(
    mask: KeepMask, final_parameters: int, rules: LayoutRules, allocation: str = GLOBAL
) -> bool:
    """Whether the layout has legal counts between the present ones and the final target."""
    before, groups = mask.removed_parameters(), _takes_from(mask, allocation)
    if allocation == EXPERTS:
        return not before  # ranked once, in one round
    if allocation == LAYERS:
        sizes = _layer_sizes(mask)
        return len(sizes) > 1 and _is_nearer(before + min(sizes), before, final_parameters)
    lower = [_next_legal(mask, group, rules) for group in groups]
    if not rules.uniform:
        steps = {
            group: (mask.kept(group) - count) * group.unit_parameters
            for group, count in zip(groups, lower, strict=True)
            if count is not None
        }
        bundles = [[g for g in bundle if g in steps] for bundle in _bundles(mask, rules)]
        left = final_parameters - before
        return any(bundle and sum(steps[g] for g in bundle) <= left for bundle in bundles)
    for kind in mask.table.kinds:
        mine = [
            (mask.kept(group) - count) * group.unit_parameters
            for group, count in zip(groups, lower, strict=True)
            if group.kind == kind and count is not None
        ]
        if mine and _is_nearer(before + sum(mine), before, final_parameters):
            return True
    return False


def _takes_from(mask: KeepMask, allocation: str) -> tuple[UnitGroup, ...]:
    """The groups that an allocation may take units from."""
    groups = mask.table.groups
    return tuple(g for g in groups if g.kind == FFN) if allocation == FFN_ALONE else groups


def _layer_sizes(mask: KeepMask) -> list[int]:
    """Parameters of the units of each layer that stays."""
    layers = [
        sum(mask.kept(group) * group.unit_parameters for group in groups)
        for _, groups in iterate_layers(mask.table)
    ]
    return [size for size in layers if size]


def _next_legal(mask: KeepMask, group: UnitGroup, rules: LayoutRules) -> int | None:
    alive = mask.kept(group)
    return max((c for c in rules.legal_counts(group.kind, group.count) if c < alive), default=None)


def _reach(mask: KeepMask, curves: list[Curve], rules: LayoutRules) -> list[int]:
    """Legal counts that every layer's candidates can bring it to, the present one included."""
    alive = min(mask.kept(curve.group) for curve in curves)
    most = min(len(curve.order) for curve in curves)
    legal = rules.legal_counts(curves[0].group.kind, curves[0].group.count)
    return [count for count in legal if alive - most <= count <= alive]


def _loss_at(mask: KeepMask, curves: list[Curve], count: int) -> float:
    return sum(float(curve.loss[mask.kept(curve.group) - count]) for curve in curves)


def check_reachable(
    mask: KeepMask, sparsity: float, rules: LayoutRules, blocks: int, allocation: str = GLOBAL
) -> None:
    """Refuse a sparsity that the layout cannot hold, or the allocation cannot find.

    Raises:
        OptionError: even the smallest legal counts leave too much, or the layout is uniform and the
            model's layers already differ in width.
    """
    experts = set(mask.experts())
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
    if allocation == LAYERS:
        _check_layers(mask, sparsity, blocks)
        return
    if allocation == EXPERTS:
        return  # selection/whole.py checks them
    most = 0
    for group in _takes_from(mask, allocation):
        smallest = rules.legal_counts(group.kind, group.count)[0]
        most += (group.count - smallest) * group.unit_parameters
    if sparsity * blocks > most:
        whole = ", attention stays whole (--allocation ffn)" if allocation == FFN_ALONE else ""
        raise OptionError(
            f"--sparsity: {sparsity:g} is beyond what the {rules.layout} layout can hold: at most "
            f"{most / blocks:.3f} of the block parameters can go (one unit of each kind stays in "
            f"every layer, FFN tile {rules.tile}{whole})"
        )


def _check_layers(mask: KeepMask, sparsity: float, blocks: int) -> None:
    """At least half of a layer goes, and at least one stays."""
    sizes = sorted(_layer_sizes(mask))
    least, most = sizes[0] / 2 / blocks, sum(sizes[:-1]) / blocks
    if not least < sparsity <= most:
        raise OptionError(
            f"--sparsity: {sparsity:g} cannot be had from whole layers: one of the {len(sizes)} is "
            f"{sizes[0] / blocks:.3f} of the block parameters and one stays; ask for more than "
            f"{least:.3f} and at most {most:.3f}"
        )
