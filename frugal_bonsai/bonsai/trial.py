"""The trial of a round's cut: recovered on a few windows, against cuts that could stand instead.

In: a round's cut and curves. Out: rival cuts of the same size, the one that recovers best, and what
each of them lost. Masks say what removal costs before recovery, on few windows; the trial sees what
is left after it. The rivals are what masks get wrong most: a cut that leaves attention whole, whose
units are few, large and the costliest mistakes, and one that takes the same share of every FFN,
which is what masks that say little should have chosen. Holds what a recovery holds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from frugal_bonsai.bonsai.select import Curve, cut, withhold
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.units import ATTENTION, KeepMask

# Names of the cuts in a round's report.
CUT, SPARED, EVEN = "cut", "attention_spared", "even"


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
        even: the same share of every FFN is a rival too.
    """
    alone = withhold(curves, ATTENTION)
    rivals = {}
    if chosen.counts()[ATTENTION] != before.counts()[ATTENTION]:
        rivals[SPARED] = cut(before, alone, target_parameters, rules)
    if even:
        rivals[EVEN] = cut(before, _alike(alone), target_parameters, rules)
    channel = max(g.unit_parameters for g in before.table.groups if g.kind != ATTENTION)
    fewest = chosen.removed_parameters() - channel
    different: dict[str, KeepMask] = {}
    for name, rival in rivals.items():
        if rival.removed_parameters() >= fewest and rival not in (chosen, *different.values()):
            different[name] = rival
    return different


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
    chosen: KeepMask, rivals: dict[str, KeepMask], recovered_loss: Callable[[KeepMask], float]
) -> tuple[KeepMask, dict[str, float]]:
    """The cut whose model has the lowest loss after a short recovery, and all losses by name."""
    cuts = {CUT: chosen, **rivals}
    losses = {name: recovered_loss(mask) for name, mask in cuts.items()}
    return cuts[min(losses, key=lambda name: losses[name])], losses
