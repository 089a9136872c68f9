"""From a prior to curves: draw masks, evaluate them, regress, and say what each removal costs.

In: the units alive, the prior, an evaluation function. Out: one :class:`~.select.Curve` a group
and the regression's held-out scores. One function a method, found by name. Holds the design.

Shape suffixes: N units, G groups, I observations, K coefficients, P units of a pool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.curve_posterior import Expected, expected_curve, fit_curves
from frugal_bonsai.bonsai.design import (
    Design,
    Pools,
    draw_group_masks,
    draw_pools,
    draw_uniform_masks,
    draw_unit_masks,
)
from frugal_bonsai.bonsai.evaluate import Observations
from frugal_bonsai.bonsai.paper_regression import fit_paper
from frugal_bonsai.bonsai.prior import Prior
from frugal_bonsai.bonsai.regress import Fit
from frugal_bonsai.bonsai.select import Curve
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.bonsai.unit_posterior import fit_units
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.units import ATTENTION, FFN, KeepMask


@dataclass(frozen=True, kw_only=True)
class RoundInputs:
    """What a method looks at.

    Attributes:
        mask: units alive.
        prior: their scores.
        settings: of the prune.
        rules: of the layout.
        share: share of each group's alive units that this round's cut takes on average.
        parameters_left: parameters that may still go until the target sparsity.
        masks: masks to draw in all.
        evaluate: evaluates a design.
        generator: of this round.
    """

    mask: KeepMask
    prior: Prior
    settings: PruneSettings
    rules: LayoutRules
    share: float
    parameters_left: int
    masks: int
    evaluate: Callable[[Design], Observations]
    generator: torch.Generator


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a round believes.

    Attributes:
        curves: predicted cost of removing units, one a group.
        fit: the regression; None when no masks were evaluated.
        observations: how many (mask, window) observations it saw.
    """

    curves: tuple[Curve, ...]
    fit: Fit | None
    observations: int


def judge_locally(given: RoundInputs) -> Judgement:
    """``local``: the prior alone, summed in ascending order."""
    pools = draw_pools(given.mask, given.prior.score_N, 1.0)
    return Judgement(curves=_cumulative(pools, given.prior.score_N), fit=None, observations=0)


def judge_units(given: RoundInputs) -> Judgement:
    """``unit``: every candidate has its own coefficient (the paper)."""
    score_N = given.prior.score_N
    share = _wide_share(given) if given.rules.uniform else given.settings.pool * given.share
    pools = draw_pools(given.mask, score_N, share)
    design = draw_unit_masks(
        pools,
        score_N,
        given.masks // 2,
        given.generator,
        each_layer=given.settings.draw == "layer",
    )
    seen = given.evaluate(design)
    off_IK = design.off_MK[seen.masks_I]
    if given.settings.regression == "paper":
        fit = fit_paper(off_IK.double(), seen.loss_I, given.generator)
    else:
        fit = fit_units(
            off_IK,
            seen.loss_I,
            score_N[design.units_K],
            seen.clusters_I,
            given.generator,
            strata_K=torch.cat([torch.full((len(m),), at) for at, m in enumerate(pools.members)]),
            windows_I=seen.windows_I,
        )
    relevance_N = torch.zeros_like(score_N)
    relevance_N[design.units_K] = fit.relevance_K
    curves = _cumulative(_reordered(pools, relevance_N), relevance_N)
    return Judgement(curves=curves, fit=fit, observations=len(seen.loss_I))


def judge_groups(given: RoundInputs) -> Judgement:
    """``group``: masks say how much of each group may go, the prior says which units."""
    if given.rules.uniform:
        return _judge_kinds(given)
    pools = draw_pools(given.mask, given.prior.score_N, given.settings.pool * given.share)
    design = draw_group_masks(
        pools, given.masks // 2, 0.5 * given.settings.pool * given.share, given.generator
    )
    seen = given.evaluate(design)
    sizes_G = pools.sizes_G.clamp_min(1)
    amount_IG = design.off_MG[seen.masks_I] / sizes_G
    fit = fit_curves(
        amount_IG,
        seen.loss_I,
        seen.clusters_I,
        given.generator,
        expected=_expected(pools, given.prior.score_N),
        windows_I=seen.windows_I,
    )
    groups = len(sizes_G)
    curves = []
    for at, (group, members) in enumerate(zip(given.mask.table.groups, pools.members, strict=True)):
        amount_P = torch.linspace(0, 1, len(members) + 1, dtype=torch.float64)
        loss = fit.relevance_K[at] * amount_P + fit.relevance_K[groups + at] * amount_P.square()
        curves.append(Curve(group=group, order=members, loss=loss))
    return Judgement(curves=tuple(curves), fit=fit, observations=len(seen.loss_I))


def _expected(pools: Pools, score_N: torch.Tensor) -> Expected:
    """What the prior, added up, makes of every group's curve."""
    curves = [expected_curve(score_N[members]) for members in pools.members]
    coefficients = [a for a, _ in curves] + [b for _, b in curves]
    return Expected(
        curve_K=torch.tensor(coefficients, dtype=torch.float64),
        kinds_G=[group.kind for group in pools.mask.table.groups],
    )


def _judge_kinds(given: RoundInputs) -> Judgement:
    """``group`` for layouts with equal counts: one amount a kind, the same in every layer.

    What is to be decided is only how much of each kind goes. Where attention cannot lose its next
    legal step within the target there is nothing to decide, and no masks are spent.
    """
    score_N, table = given.prior.score_N, given.mask.table
    pools = draw_pools(given.mask, score_N, _wide_share(given))
    step = _attention_step(given)
    if step is None:
        return Judgement(curves=_cumulative(pools, score_N), fit=None, observations=0)
    pools = Pools(
        pools.mask,
        tuple(
            _lowest(given.mask, score_N, at, step) if group.kind == ATTENTION else members
            for at, (group, members) in enumerate(zip(table.groups, pools.members, strict=True))
        ),
    )
    design = draw_uniform_masks(pools, given.masks // 2, given.generator)
    seen = given.evaluate(design)
    kinds = (ATTENTION, FFN)
    first = [next(i for i, g in enumerate(table.groups) if g.kind == kind) for kind in kinds]
    amount_IG = design.off_MG[seen.masks_I][:, first] / pools.sizes_G[first]
    fit = fit_curves(
        amount_IG, seen.loss_I, seen.clusters_I, given.generator, windows_I=seen.windows_I
    )
    curves = []
    for group, members in zip(table.groups, pools.members, strict=True):
        at = kinds.index(group.kind)
        amount_P = torch.linspace(0, 1, len(members) + 1, dtype=torch.float64)
        loss = fit.relevance_K[at] * amount_P + fit.relevance_K[2 + at] * amount_P.square()
        layers = sum(other.kind == group.kind for other in table.groups)
        curves.append(Curve(group=group, order=members, loss=loss / layers))
    return Judgement(curves=tuple(curves), fit=fit, observations=len(seen.loss_I))


def _attention_step(given: RoundInputs) -> int | None:
    """Units that every layer loses at attention's next legal count; None if none fits."""
    groups = [group for group in given.mask.table.groups if group.kind == ATTENTION]
    alive = min(given.mask.kept(group) for group in groups)
    lower = [c for c in given.rules.legal_counts(ATTENTION, groups[0].count) if c < alive]
    if not lower:
        return None
    step = alive - lower[-1]
    cost = step * sum(group.unit_parameters for group in groups)
    return step if cost <= given.parameters_left else None


def _lowest(mask: KeepMask, score_N: torch.Tensor, at: int, count: int) -> torch.Tensor:
    """The ``count`` alive units of group ``at`` with the lowest prior."""
    group = mask.table.groups[at]
    alive = mask.of(group).nonzero().flatten() + mask.table.span(group).start
    lowest: torch.Tensor = alive[score_N[alive].argsort(stable=True)][:count]
    return lowest


def _wide_share(given: RoundInputs) -> float:
    """Pools wide enough that FFN alone can make up a whole step of attention."""
    step = _attention_step(given) or 0
    table = given.mask.table
    attention = step * sum(g.unit_parameters for g in table.groups if g.kind == ATTENTION)
    ffn = sum(given.mask.kept(g) * g.unit_parameters for g in table.groups if g.kind == FFN)
    alive = table.parameters - given.mask.removed_parameters()
    needed = max(given.settings.pool * given.share * alive, 1.25 * attention)
    tile = sum(g.unit_parameters for g in table.groups if g.kind == FFN) * given.rules.tile
    return min(1.0, (needed + tile) / ffn)


def _reordered(pools: Pools, score_N: torch.Tensor) -> Pools:
    return Pools(pools.mask, tuple(m[score_N[m].argsort(stable=True)] for m in pools.members))


def _cumulative(pools: Pools, score_N: torch.Tensor) -> tuple[Curve, ...]:
    """Curves that add up the units' scores in the pools' order."""
    curves = []
    for group, members in zip(pools.mask.table.groups, pools.members, strict=True):
        loss = torch.cat([torch.zeros(1, dtype=torch.float64), score_N[members].cumsum(0)])
        curves.append(Curve(group=group, order=members, loss=loss))
    return tuple(curves)


JUDGES: dict[str, Callable[[RoundInputs], Judgement]] = {
    "local": judge_locally,
    "unit": judge_units,
    "group": judge_groups,
}
