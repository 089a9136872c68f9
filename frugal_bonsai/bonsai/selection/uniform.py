"""The cut of the uniform layout: the same counts in every layer.

In: curves, a target in parameters. Out: the mask of the units that stay. Each legal count of
attention units is paired with the FFN width nearest to the target, and the cheapest pair wins.
Holds one option per legal count of attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.selection.curves import Curve
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.units import ATTENTION, FFN, KeepMask


@dataclass(frozen=True)
class UniformCounts:
    """Counts of units that stay in every layer.

    Attributes:
        attention: Attention units.
        ffn: FFN channels.
        removed_parameters: Parameters removed in all with these counts.
        loss: Predicted loss increase of this round's removal.
    """

    attention: int
    ffn: int
    removed_parameters: int
    loss: float

    def of(self, kind: str) -> int:
        """Return the count of a kind."""
        return self.attention if kind == ATTENTION else self.ffn


def uniform_options(
    mask: KeepMask, curves: tuple[Curve, ...], target_parameters: int, rules: LayoutRules
) -> list[UniformCounts]:
    """Return, for each attainable attention count, the FFN count nearest to the target."""
    attention = [curve for curve in curves if curve.group.kind == ATTENTION]
    ffn = [curve for curve in curves if curve.group.kind == FFN]
    widths = _attainable(mask, ffn, rules)
    options = []
    for heads in _attainable(mask, attention, rules):
        removed = {w: _removed(attention, heads) + _removed(ffn, w) for w in widths}
        width = min(widths, key=lambda w: (abs(removed[w] - target_parameters), w))
        loss = _loss_at(mask, attention, heads) + _loss_at(mask, ffn, width)
        options.append(UniformCounts(heads, width, removed[width], loss))
    return options


def cut_uniform(
    mask: KeepMask,
    curves: tuple[Curve, ...],
    sizes: list[float],
    target_parameters: int,
    final_parameters: int,
    rules: LayoutRules,
    *,
    equal: bool,
) -> KeepMask:
    """Cut every layer to the same legal number of heads and FFN width.

    Of the pairs near the target, take the one with the lowest predicted loss per parameter (or per
    millisecond). With ``equal``, take the one whose kept shares of attention and FFN are closest.
    The mask is unchanged if no pair is nearer to the final target.
    """
    before = mask.removed_parameters()
    options = [
        option
        for option in uniform_options(mask, curves, target_parameters, rules)
        if is_nearer(option.removed_parameters, before, final_parameters)
    ]
    # A step of attention may be larger than a round. It does not pass the final target while a
    # narrower FFN can meet it: the nearest legal size may lie half a tile beyond the target.
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
    chosen = [c.order[: mask.kept(c.group) - best.of(c.group.kind)] for c in curves]
    return mask.without(torch.cat(chosen))


def is_nearer(removed: int, before: int, final: int) -> bool:
    """Tell whether more is removed than before, and the final target is nearer than before."""
    return removed > before and removed - final < final - before


def _removed_size(
    mask: KeepMask, curves: tuple[Curve, ...], sizes: list[float], option: UniformCounts
) -> float:
    return sum(
        (mask.kept(c.group) - option.of(c.group.kind)) * size
        for c, size in zip(curves, sizes, strict=True)
    )


def _attainable(mask: KeepMask, curves: list[Curve], rules: LayoutRules) -> list[int]:
    """Return the legal counts that every layer's candidates allow, the present one included."""
    alive = min(mask.kept(curve.group) for curve in curves)
    most = min(len(curve.order) for curve in curves)
    legal = rules.legal_counts(curves[0].group.kind, curves[0].group.count)
    return [count for count in legal if alive - most <= count <= alive]


def _removed(curves: list[Curve], count: int) -> int:
    return sum((c.group.count - count) * c.group.unit_parameters for c in curves)


def _loss_at(mask: KeepMask, curves: list[Curve], count: int) -> float:
    return sum(float(curve.loss[mask.kept(curve.group) - count]) for curve in curves)
