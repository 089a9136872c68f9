"""Candidate selection: a round's cut against cuts with equal FFN widths, after reconstruction.

In: a round's cut and curves. Out: the candidates, the one that is selected, and the loss of each.
Masks estimate what removal costs before reconstruction, on few windows; candidates are compared
after it, on windows that they were not fitted to. All candidates remove equally many parameters.
The others take the same share of every FFN, and of attention nothing (the baseline), that share, or
two and three times it, as long as more of it helps; the curves choose the attention units.

The baseline is kept unless another candidate is better beyond its error: candidates are
reconstructed on less text than the last round, without channel updates, and that favours cuts of
attention and unequal FFNs. Holds the memory of a reconstruction.

Shape suffixes: N windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from frugal_bonsai.bonsai.selection.curves import Curve, quadratic_curve, withhold
from frugal_bonsai.bonsai.selection.cut import cut
from frugal_bonsai.bonsai.selection.schedule import removed_share
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.units import ATTENTION, FFN, KeepMask

# Names of the candidates in a round's report: the round's own cut, and equal widths.
CUT, EVEN = "cut", "even"
# Equal widths that take attention too, and how many times the round's share of it.
WITH_ATTENTION = {"even_attention": 1, "even_attention_x2": 2, "even_attention_x3": 3}
MOST_CANDIDATES = 2 + len(WITH_ATTENTION)
# A candidate replaces the baseline only if its gain exceeds this many standard errors of the
# difference (window by window), and this many nats times the share of the blocks that the round
# removes. Channel updates after the last cut, and more text, have reversed differences of that size
# (docs/results/trials_2-core-cpu_2026-11-25.md).
_ERRORS, _BIAS_NATS = 2.0, 0.25


def equal_width_cuts(
    before: KeepMask,
    chosen: KeepMask,
    curves: tuple[Curve, ...],
    target_parameters: int,
    rules: LayoutRules,
) -> dict[str, KeepMask]:
    """Return the cuts with equal FFN widths that compete with a round's own cut.

    Cuts that the pools cannot fill are left out: one that stops a channel short of the target would
    cost another round.

    Args:
        before: Units alive before the round.
        chosen: Units that the round's own cut keeps.
        curves: The curves of the round.
        target_parameters: Parameters removed in all at which the round aims.
        rules: Rules of the output layout.

    Returns:
        Masks by name, the baseline first, then by rising share of attention. The first one may be
        the round's own cut. Empty if no cut differs from the round's own.
    """
    # With these, every FFN costs the same at the same share of its pool.
    alike = tuple(
        quadratic_curve(curve.group, curve.order, 0.0, 1.0) for curve in withhold(curves, ATTENTION)
    )
    share = removed_share(before, target_parameters)
    channel = max(g.unit_parameters for g in before.table.groups if g.kind != ATTENTION)
    fewest = chosen.removed_parameters() - channel
    found: dict[str, KeepMask] = {}
    for name, multiple in {EVEN: 0, **WITH_ATTENTION}.items():
        without = _without_attention(before, curves, multiple * share, rules)
        if without.removed_parameters() > target_parameters:
            continue
        mask = cut(without, alike, target_parameters, rules)
        # The round's own cut is listed only where it is the baseline.
        known = (chosen, *found.values()) if found else ()
        if mask.removed_parameters() >= fewest and mask not in known:
            found[name] = mask
    return {} if list(found.values()) == [chosen] else found


def _without_attention(
    before: KeepMask, curves: tuple[Curve, ...], share: float, rules: LayoutRules
) -> KeepMask:
    """Return the mask without its cheapest attention units, a share of them."""
    attention = [curve.group for curve in curves if curve.group.kind == ATTENTION]
    units = round(share * sum(before.kept(group) for group in attention))
    if not units:
        return before
    parameters = units * attention[0].unit_parameters
    return cut(before, withhold(curves, FFN), before.removed_parameters() + parameters, rules)


def select_cut(
    chosen: KeepMask,
    others: dict[str, KeepMask],
    losses_of: Callable[[KeepMask], torch.Tensor],
    *,
    share: float,
    in_nats: bool = True,
    ahead: Callable[[list[KeepMask]], None] = lambda masks: None,
    together: int = 1,
) -> tuple[KeepMask, dict[str, float]]:
    """Select a cut by its loss after reconstruction.

    Args:
        chosen: The round's own cut.
        others: See :func:`equal_width_cuts`; the first one is the baseline.
        losses_of: Returns the losses of a cut's reconstructed model ``[N]``, on the same windows
            for all cuts.
        share: Share of the block parameters that the cuts remove.
        in_nats: The losses are mean NLL. Losses by a user's utility have units of their own, and
            then only the standard error counts.
        ahead: Measures the next candidates together, before ``losses_of`` is asked for each; some
            of them may then not be asked for.
        together: Number of candidates of ``ahead``.

    Returns:
        The selected mask and the mean loss of each candidate by name.
    """
    # A baseline that is the round's own cut is reconstructed once.
    cuts = {CUT: chosen, **{name: mask for name, mask in others.items() if mask != chosen}}
    losses: dict[str, torch.Tensor] = {}
    means: dict[str, float] = {}
    for at, (name, mask) in enumerate(cuts.items()):
        if at % together == 0:
            ahead(list(cuts.values())[at : at + together])
        last = math.inf if not means else list(means.values())[-1]
        losses[name] = losses_of(mask).double()
        means[name] = float(losses[name].mean())
        if name in WITH_ATTENTION and means[name] >= last:
            break  # the next candidate would take still more attention
    first = next(iter(others))
    baseline = first if first in cuts else CUT
    best = min(means, key=means.__getitem__)
    bias = _BIAS_NATS * share if in_nats else 0.0
    selected = best if _is_better(losses[best], losses[baseline], bias) else baseline
    return cuts[selected], means


def _is_better(loss_N: torch.Tensor, baseline_N: torch.Tensor, bias: float) -> bool:
    """Tell whether the mean gain exceeds error and bias; a single window has no error."""
    gain_N = baseline_N - loss_N
    error = float(gain_N.std()) / math.sqrt(len(gain_N)) if len(gain_N) > 1 else 0.0
    return float(gain_N.mean()) > max(_ERRORS * error, bias)
