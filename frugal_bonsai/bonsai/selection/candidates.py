"""The trial of a round's cut: recovered on some windows, against cuts that could stand instead.

In: a round's cut and curves. Out: rival cuts of the same size, the one that stands, and what each
of them lost. Masks say what removal costs before recovery, on few windows; the trial sees what is
left after it. The rivals part the cut's two decisions, attention against FFN and one FFN against
another: they take the same share of every FFN, and of attention nothing, that share, or a multiple
of it as long as more of it helps; which of its units those are, the curves say. Without evidence
attention stays whole and FFNs lose alike: that cut stands unless another is better beyond its
error, for the trial too sees less text than the last recovery, and does not refine. Holds what a
recovery holds.

Shape suffixes: N windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from frugal_bonsai.bonsai.selection.cut import Curve, cut, withhold
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.units import ATTENTION, KeepMask

# Names of the cuts in a round's report.
CUT, SPARED, EVEN = "cut", "attention_spared", "even"
# Even cuts that take attention too: so many times the round's share of its units.
WITH_ATTENTION = {"even_attention": 1, "even_attention_x2": 2, "even_attention_x3": 3}
# Cuts that a trial may try: the round's own and its rivals.
MOST_CUTS, MOST_CUTS_SPARED = 2 + len(WITH_ATTENTION), 2
# A cut must be better than the one that stands without evidence by so many standard errors of the
# difference, window by window, and by this many nats for all of the blocks, a tenth of that where a
# round takes a tenth: by so much have the refinement that follows the last cut, and the text that
# the trial lacks, turned differences (docs/results/trials_2-core-cpu_2026-11-25.md).
_ERRORS, _BIAS_NATS = 2.0, 0.25


def rival_cuts(
    before: KeepMask,
    chosen: KeepMask,
    curves: tuple[Curve, ...],
    target_parameters: int,
    rules: LayoutRules,
    *,
    even: bool,
) -> dict[str, KeepMask]:
    """Cuts of the same size by other rules; without those that the pools cannot fill.

    Args:
        before: units alive.
        chosen: what the round's cut keeps.
        curves: of the round.
        target_parameters: what the round aims at; a cut that stopped a channel short of it would
            cost a round more.
        rules: of the layout.
        even: the rivals take the same share of every FFN; else the cut's own spared attention is
            the only one.

    Returns:
        By name, the one that stands without evidence first, then by what they take of attention.
        The first one may be the round's own cut; none where all of them would be.
    """
    alone = withhold(curves, ATTENTION)
    rivals = {}
    if even:
        alike, share = _alike(alone), _share(before, target_parameters)
        for name, multiple in {EVEN: 0, **WITH_ATTENTION}.items():
            without = _without_attention(before, curves, multiple * share, rules)
            if without.removed_parameters() <= target_parameters:
                rivals[name] = cut(without, alike, target_parameters, rules)
    elif chosen.counts()[ATTENTION] != before.counts()[ATTENTION]:
        rivals[SPARED] = cut(before, alone, target_parameters, rules)
    channel = max(g.unit_parameters for g in before.table.groups if g.kind != ATTENTION)
    fewest = chosen.removed_parameters() - channel
    different: dict[str, KeepMask] = {}
    for name, rival in rivals.items():
        # The round's own cut stays where it is the first: it stands without evidence then.
        known = (chosen, *different.values()) if different else ()
        if rival.removed_parameters() >= fewest and rival not in known:
            different[name] = rival
    return {} if list(different.values()) == [chosen] else different


def _share(before: KeepMask, target_parameters: int) -> float:
    """Share of the alive units that a round takes."""
    removed = before.removed_parameters()
    return (target_parameters - removed) / (before.table.parameters - removed)


def _without_attention(
    before: KeepMask, curves: tuple[Curve, ...], share: float, rules: LayoutRules
) -> KeepMask:
    """The mask without the cheapest of its attention units, a share of them."""
    attention = tuple(curve for curve in curves if curve.group.kind == ATTENTION)
    alive = sum(before.kept(curve.group) for curve in attention)
    units = round(share * alive)
    if not units:
        return before
    parameters = units * attention[0].group.unit_parameters
    offered = tuple(
        curve if curve.group.kind == ATTENTION else _nothing_of(curve) for curve in curves
    )
    return cut(before, offered, before.removed_parameters() + parameters, rules)


def _nothing_of(curve: Curve) -> Curve:
    return Curve(group=curve.group, order=curve.order[:0], loss=curve.loss[:1])


def _alike(curves: tuple[Curve, ...]) -> tuple[Curve, ...]:
    """Every group loses the same at the same share of its pool."""
    return tuple(
        Curve(
            group=curve.group,
            order=curve.order,
            loss=torch.linspace(0, 1, len(curve.order) + 1, dtype=torch.float64).square(),
        )
        for curve in curves
    )


def try_cuts(
    chosen: KeepMask,
    rivals: dict[str, KeepMask],
    recovered_losses: Callable[[KeepMask], torch.Tensor],
    *,
    share: float,
    in_nats: bool = True,
) -> tuple[KeepMask, dict[str, float]]:
    """The cut that stands, and all mean losses by name.

    Args:
        chosen: the round's cut.
        rivals: see :func:`rival_cuts`; the first one stands unless another is clearly better.
        recovered_losses: of a cut's model after recovery ``[N]``, the same windows for all.
        share: of the block parameters that the cuts remove.
        in_nats: the losses are mean NLL; a user's utility has units of its own, and no margin in
            nats beyond its error.
    """
    # One that is the round's own cut is not tried twice.
    others = {name: mask for name, mask in rivals.items() if mask != chosen}
    cuts = {CUT: chosen, **others}
    losses: dict[str, torch.Tensor] = {}
    before = math.inf
    for name, mask in cuts.items():
        losses[name] = recovered_losses(mask).double()
        if name in WITH_ATTENTION and float(losses[name].mean()) >= before:
            break  # the next one would take still more
        before = float(losses[name].mean())
    first = next(iter(rivals))
    stands = first if first in others else CUT
    best = min(losses, key=lambda name: float(losses[name].mean()))
    bias = _BIAS_NATS * share if in_nats else 0.0
    if _clearly_better(losses[best], losses[stands], bias):
        stands = best
    return cuts[stands], {name: float(loss_N.mean()) for name, loss_N in losses.items()}


def _clearly_better(loss_N: torch.Tensor, other_N: torch.Tensor, bias: float) -> bool:
    """Whether the mean difference is beyond error and bias; one window has no error."""
    gain_N = other_N - loss_N
    error = float(gain_N.std()) / math.sqrt(len(gain_N)) if len(gain_N) > 1 else 0.0
    return float(gain_N.mean()) > max(_ERRORS * error, bias)
