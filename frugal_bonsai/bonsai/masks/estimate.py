"""From a prior to curves: what each removal costs, by masks or by the prior alone.

In: the units alive, the prior, an evaluation function. Out: one :class:`~.select.Curve` a group
and the regression's held-out scores. One function a level, found by name: it draws the pools and
lets sampling.py ask. Holds the pools.

Shape suffixes: N units, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.importance.scores import ImportanceScores
from frugal_bonsai.bonsai.masks.curve_priors import Ahead, Expected, behind_cut, by_statistic
from frugal_bonsai.bonsai.masks.design import Design, Pools, draw_pools
from frugal_bonsai.bonsai.masks.estimators import (
    GroupQuestion,
    KindQuestion,
    UnitQuestion,
    cumulative_curves,
    gone_counts,
)
from frugal_bonsai.bonsai.masks.evaluate import Observations
from frugal_bonsai.bonsai.masks.sampling import Focus, Judgement, Question, sample
from frugal_bonsai.bonsai.selection.cut import Curve
from frugal_bonsai.bonsai.settings import GROUP, NONE, UNIT, PruneSettings
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.units import ATTENTION, FFN, KeepMask


@dataclass(frozen=True, kw_only=True)
class RoundInputs:
    """What a judge looks at.

    Attributes:
        mask: units alive.
        prior: their scores.
        settings: of the prune.
        rules: of the layout.
        share: share of each group's alive units that this round's cut takes on average.
        parameters_left: parameters that may still go until the target sparsity.
        windows: that have masks of their own; 1 where masks are shared by all windows.
        evaluate: evaluates a design with so many masks on every window.
        cut: what a round that believed these curves would keep.
        ahead: what the last round's curves foretell.
        generator: of this round.
    """

    mask: KeepMask
    prior: ImportanceScores
    settings: PruneSettings
    rules: LayoutRules
    share: float
    parameters_left: int
    windows: int
    evaluate: Callable[[Design, int], Observations]
    cut: Callable[[tuple[Curve, ...]], KeepMask]
    ahead: Ahead | None
    generator: torch.Generator


def judge_locally(given: RoundInputs) -> Judgement:
    """``none``: the prior alone, summed in ascending order."""
    pools = draw_pools(given.mask, given.prior.score_N, 1.0, given.rules)
    return _unasked(pools, given.prior.score_N)


def judge_units(given: RoundInputs) -> Judgement:
    """``unit``: every candidate has its own coefficient (the paper)."""
    score_N = given.prior.score_N
    share = _wide_share(given) if given.rules.uniform else given.settings.pool * given.share
    pools = draw_pools(given.mask, score_N, share, given.rules)
    return _ask(given, UnitQuestion(pools, score_N, given.settings, given.generator))


def judge_groups(given: RoundInputs) -> Judgement:
    """``group``: masks say how much of each group may go, the prior says which units."""
    if given.rules.uniform:
        return _judge_kinds(given)
    score_N, share = given.prior.score_N, given.settings.pool * given.share
    pools = draw_pools(given.mask, score_N, share, given.rules)
    return _ask(given, GroupQuestion(pools, 0.5 * share, _expected(given, pools), given.generator))


def _judge_kinds(given: RoundInputs) -> Judgement:
    """``group`` for layouts with equal counts: one amount a kind, the same in every layer.

    What is to be decided is only how much of each kind goes. Where attention cannot lose its next
    legal step within the target there is nothing to decide, and no masks are spent.
    """
    score_N, table = given.prior.score_N, given.mask.table
    pools = draw_pools(given.mask, score_N, _wide_share(given), given.rules)
    step = _attention_step(given)
    if step is None:
        return _unasked(pools, score_N)
    pools = Pools(
        pools.mask,
        tuple(
            _lowest(given.mask, score_N, at, step) if group.kind == ATTENTION else members
            for at, (group, members) in enumerate(zip(table.groups, pools.members, strict=True))
        ),
    )
    return _ask(given, KindQuestion(pools, given.generator))


def _unasked(pools: Pools, score_N: torch.Tensor) -> Judgement:
    return Judgement(curves=cumulative_curves(pools, score_N), fit=None, observations=0)


def _ask(given: RoundInputs, question: Question[Focus]) -> Judgement:
    return sample(
        question,
        given.evaluate,
        given.cut,
        masks=given.settings.masks,
        windows=given.windows,
        target=given.settings.certainty,
        generator=given.generator,
    )


def _expected(given: RoundInputs, pools: Pools) -> list[Expected]:
    """What may be known of the groups' curves before any mask of this round."""
    expected = [by_statistic([given.prior.score_N[m] for m in pools.members])]
    if given.ahead is not None:
        expected.insert(0, given.ahead.expected(pools.sizes_G))
    return expected


def look_ahead(judgement: Judgement, mask: KeepMask, cut: KeepMask) -> Ahead | None:
    """What the groups' curves foretell behind a cut; None where groups have no curves."""
    sizes_G = torch.tensor([len(curve.order) for curve in judgement.curves])
    if judgement.fit is None or len(judgement.fit.relevance_K) != 2 * len(sizes_G):
        return None
    return behind_cut(judgement.fit.relevance_K, sizes_G, gone_counts(mask, cut))


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


JUDGES: dict[str, Callable[[RoundInputs], Judgement]] = {
    NONE: judge_locally,
    UNIT: judge_units,
    GROUP: judge_groups,
}
