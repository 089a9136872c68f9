"""One round's estimate: the cost of removing units, by masks or by importance alone.

In: the units alive, their importance, an evaluation function. Out: an
:class:`~frugal_bonsai.bonsai.masks.sampling.Estimate` with one curve per group. Chooses the pools
and the estimator for the level and the layout; sampling.py draws and evaluates. Holds the pools.

Shape suffixes: N units, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from frugal_bonsai.bonsai.masks.design import (
    Pools,
    draw_group_masks,
    draw_pools,
    draw_uniform_masks,
    least_important,
)
from frugal_bonsai.bonsai.masks.estimators import CurveEstimator, UnitEstimator, importance_curves
from frugal_bonsai.bonsai.masks.evaluate import MaskEvaluator
from frugal_bonsai.bonsai.masks.sampling import Estimate, Estimator, sample_masks
from frugal_bonsai.bonsai.selection.cut import cut_round
from frugal_bonsai.bonsai.selection.schedule import Schedule
from frugal_bonsai.bonsai.settings import NONE, UNIT, PruneSettings
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.units import ATTENTION, FFN, KeepMask


@dataclass(frozen=True, kw_only=True)
class RoundInputs:
    """The inputs of an estimate.

    Attributes:
        mask: Units alive.
        score_N: Importance of each unit, float64.
        schedule: Settings, layout rules and the goal of the round.
        evaluator: Evaluates the round's masks.
    """

    mask: KeepMask
    score_N: torch.Tensor
    schedule: Schedule
    evaluator: MaskEvaluator

    @property
    def settings(self) -> PruneSettings:
        """Settings of the prune."""
        return self.schedule.settings

    @property
    def rules(self) -> LayoutRules:
        """Rules of the output layout."""
        return self.schedule.rules

    @property
    def generator(self) -> torch.Generator:
        """Random draws of the round."""
        return self.evaluator.generator

    @property
    def pool_share(self) -> float:
        """Share of the alive units that are candidates where pools are shares of every group."""
        return self.settings.pool * self.schedule.share(self.mask)


def estimate_round(given: RoundInputs) -> Estimate:
    """Estimate the cost of removing units at the level of the settings."""
    if given.settings.level == NONE:
        return _by_importance(given, draw_pools(given.mask, given.score_N, 1.0, given.rules))
    share = _wide_share(given) if given.rules.uniform else given.pool_share
    pools = draw_pools(given.mask, given.score_N, share, given.rules)
    if given.settings.level == UNIT:
        return _by_masks(given, UnitEstimator(pools, given.score_N, given.generator))
    if not given.rules.uniform:
        return _by_masks(given, _group_estimator(given, pools))
    step = _attention_step(given)
    if step is None:
        # No step of attention fits: the FFN makes up the whole round, and masks decide nothing.
        return _by_importance(given, pools)
    return _by_masks(given, _kind_estimator(given, pools, step))


def _by_importance(given: RoundInputs, pools: Pools) -> Estimate:
    return Estimate(curves=importance_curves(pools, given.score_N))


def _by_masks(given: RoundInputs, estimator: Estimator) -> Estimate:
    return sample_masks(
        estimator,
        given.evaluator.evaluate,
        lambda curves: cut_round(given.schedule, given.mask, curves)[0],
        masks=given.settings.masks,
        windows=given.evaluator.windows,
        target=given.settings.certainty,
        generator=given.generator,
    )


def _group_estimator(given: RoundInputs, pools: Pools) -> CurveEstimator:
    """A curve for each layer and kind; the experts of a layer share one."""
    numbers: dict[tuple[int, str], int] = {}
    keys = [(group.layer, group.kind) for group in given.mask.table.groups]
    curve_G = torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])
    draw = partial(
        draw_group_masks,
        pools,
        expected_share=0.5 * given.pool_share,
        generator=given.generator,
    )
    return CurveEstimator(pools, curve_G, draw, given.generator)


def _kind_estimator(given: RoundInputs, pools: Pools, step: int) -> CurveEstimator:
    """A curve for each kind; attention's pools hold its next legal step."""
    groups, kinds = given.mask.table.groups, given.mask.table.kinds
    members = tuple(
        least_important(given.mask, group, given.score_N)[:step]
        if group.kind == ATTENTION
        else mine
        for group, mine in zip(groups, pools.members, strict=True)
    )
    pools = Pools(pools.mask, members)
    curve_G = torch.tensor([kinds.index(group.kind) for group in groups])
    draw = partial(draw_uniform_masks, pools, generator=given.generator)
    return CurveEstimator(pools, curve_G, draw, given.generator)


def _attention_step(given: RoundInputs) -> int | None:
    """Return the units that every layer loses at attention's next legal count; None if too many."""
    groups = [group for group in given.mask.table.groups if group.kind == ATTENTION]
    alive = min(given.mask.kept(group) for group in groups)
    lower = [c for c in given.rules.legal_counts(ATTENTION, groups[0].count) if c < alive]
    if not lower:
        return None
    step = alive - lower[-1]
    cost = step * sum(group.unit_parameters for group in groups)
    left = given.schedule.final_parameters - given.mask.removed_parameters()
    return step if cost <= left else None


def _wide_share(given: RoundInputs) -> float:
    """Return the share of the uniform layout's pools.

    They are wide enough that FFN units alone can make up for a whole step of attention.
    """
    step = _attention_step(given) or 0
    table = given.mask.table
    attention = step * sum(g.unit_parameters for g in table.groups if g.kind == ATTENTION)
    ffn = sum(given.mask.kept(g) * g.unit_parameters for g in table.groups if g.kind == FFN)
    alive = table.parameters - given.mask.removed_parameters()
    needed = max(given.pool_share * alive, 1.25 * attention)
    tile = sum(g.unit_parameters for g in table.groups if g.kind == FFN) * given.rules.tile
    return min(1.0, (needed + tile) / ffn)
