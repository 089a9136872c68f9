"""What each method asks masks, and how it reads the answers: units, groups, kinds.

In: the pools of a round. Out: designs, regressions, curves, for the loop in sampling.py. Each holds
its pools.

Shape suffixes: N units, G groups, I observations, K coefficients, P units of a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from frugal_bonsai.bonsai.masks.curve_posterior import fit_curves
from frugal_bonsai.bonsai.masks.curve_priors import Expected
from frugal_bonsai.bonsai.masks.design import (
    GroupDesign,
    GroupFocus,
    Pools,
    UnitDesign,
    UnitFocus,
    draw_group_masks,
    draw_uniform_masks,
    draw_unit_masks,
)
from frugal_bonsai.bonsai.masks.paper import fit_paper
from frugal_bonsai.bonsai.masks.regression import Fit
from frugal_bonsai.bonsai.masks.sampling import Seen, taken_share, undecided
from frugal_bonsai.bonsai.masks.unit_posterior import fit_units
from frugal_bonsai.bonsai.selection.cut import Curve
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.model.units import KeepMask, UnitGroup

# A later batch looks a little beyond what the posterior's cuts differ by: a tenth of the pool.
_MARGIN = 0.1


class UnitQuestion:
    """``unit``: every candidate has its own coefficient (the paper).

    Args:
        pools: the candidates.
        score_N: the prior.
        settings: which draw, which regression.
        generator: of the round.
    """

    def __init__(
        self,
        pools: Pools,
        score_N: torch.Tensor,
        settings: PruneSettings,
        generator: torch.Generator,
    ) -> None:
        self._pools, self._score_N = pools, score_N
        self._settings, self._generator = settings, generator
        self._units_K = torch.cat(pools.members)

    def draw(self, pairs: int, focus: UnitFocus | None) -> UnitDesign:
        """Masks that switch off half of a kind's (or layer's) candidates."""
        return draw_unit_masks(
            self._pools,
            self._score_N,
            pairs,
            self._generator,
            each_layer=self._settings.draw == "layer",
            focus=focus,
        )

    def fit(self, seen: Seen) -> Fit:
        """The posterior of every candidate, or the published regression."""
        if self._settings.regression == "paper":
            return fit_paper(seen.off_IX.double(), seen.loss_I, self._generator)
        members = self._pools.members
        return fit_units(
            seen.off_IX,
            seen.loss_I,
            self._score_N[self._units_K],
            seen.clusters_I,
            self._generator,
            strata_K=torch.cat([torch.full((len(m),), at) for at, m in enumerate(members)]),
            windows_I=seen.windows_I,
        )

    def curves(self, relevance_K: torch.Tensor) -> tuple[Curve, ...]:
        """Relevances added up, the lowest first."""
        relevance_N = torch.zeros_like(self._score_N)
        relevance_N[self._units_K] = relevance_K
        members = tuple(m[relevance_N[m].argsort(stable=True)] for m in self._pools.members)
        return cumulative_curves(Pools(self._pools.mask, members), relevance_N)

    def loss(self, relevance_K: torch.Tensor, cut: KeepMask) -> float:
        """The relevances of what goes."""
        return float(relevance_K[~cut.keep_N[self._units_K]].sum())

    def focus(self, cuts: list[KeepMask]) -> UnitFocus:
        """The candidates that some of the cuts take and others do not."""
        share_K = taken_share(self._pools.mask, cuts)[self._units_K]
        doubted_K = undecided(share_K)
        return UnitFocus(doubted_K=doubted_K, gone_K=~doubted_K & (share_K > 0.5))


class GroupQuestion:
    """``group``: masks say how much of each group may go, the prior says which units.

    A layer's experts are asked about together: a mask takes the same share of each one's pool, and
    one curve is fitted for all. Alone there would be thousands of curves for a few hundred masks.

    Args:
        pools: the candidates.
        expected_share: of a group, that masks take on average where pools are small.
        expected: what is known of the curves before.
        generator: of the round.
    """

    def __init__(
        self,
        pools: Pools,
        expected_share: float,
        expected: Sequence[Expected],
        generator: torch.Generator,
    ) -> None:
        self._pools, self._share = pools, expected_share
        self._generator = generator
        self._together_G = _asked_together(pools.mask)
        self._questions = int(self._together_G.max()) + 1
        # The first group of each question speaks for all of them.
        places = self._together_G.tolist()
        self._first_Q = torch.tensor([places.index(q) for q in range(self._questions)])
        self._expected = [replace(e, curve_K=self._added_up(e.curve_K)) for e in expected]

    def _added_up(self, curve_K: torch.Tensor) -> torch.Tensor:
        """The sum of the curves that are asked about together, ``[2Q]`` of ``[2G]``."""
        sums = curve_K.new_zeros(2, self._questions)
        return sums.index_add_(1, self._together_G, curve_K.view(2, -1)).flatten()

    def _parts(self, relevance_K: torch.Tensor) -> torch.Tensor:
        """Each group's part of a question's curve, ``[2, G]`` of ``[2Q]``."""
        count_Q = torch.bincount(self._together_G, minlength=self._questions)
        return (relevance_K.view(2, -1) / count_Q)[:, self._together_G]

    def draw(self, pairs: int, focus: GroupFocus | None) -> GroupDesign:
        """Masks that take an amount of every pool."""
        design = draw_group_masks(self._pools, pairs, self._share, self._generator, focus)
        if self._questions == len(self._together_G):
            return design
        sizes_G = self._pools.sizes_G
        share_MQ = design.off_MG[:, self._first_Q] / sizes_G[self._first_Q].clamp_min(1)
        off_MG = (share_MQ[:, self._together_G] * sizes_G).round().long()
        return GroupDesign(self._pools, off_MG)

    def fit(self, seen: Seen) -> Fit:
        """The posterior of every question's curve."""
        groups, first_Q = self._pools.mask.table.groups, self._first_Q
        return fit_curves(
            seen.off_IX[:, first_Q] / self._pools.sizes_G[first_Q].clamp_min(1),
            seen.loss_I,
            seen.clusters_I,
            self._generator,
            kinds_G=[groups[at].kind for at in first_Q.tolist()],
            expected=self._expected,
            windows_I=seen.windows_I,
        )

    def curves(self, relevance_K: torch.Tensor) -> tuple[Curve, ...]:
        """The fitted curves at every whole number of units."""
        a_G, b_G = self._parts(relevance_K)
        groups, members = self._pools.mask.table.groups, self._pools.members
        return tuple(
            quadratic_curve(group, mine, float(a), float(b))
            for group, mine, a, b in zip(groups, members, a_G, b_G, strict=True)
        )

    def loss(self, relevance_K: torch.Tensor, cut: KeepMask) -> float:
        """The curves where the cut leaves them."""
        amount_G = gone_counts(self._pools.mask, cut) / self._pools.sizes_G.clamp_min(1)
        amount_K = torch.cat([amount_G, amount_G.square()]).double()
        return float(amount_K @ self._parts(relevance_K).flatten())

    def focus(self, cuts: list[KeepMask]) -> GroupFocus:
        """Between the least and the most that the cuts take of each group, and a little beyond."""
        sizes_G = self._pools.sizes_G
        counts_DG = torch.stack([gone_counts(self._pools.mask, cut) for cut in cuts])
        margin_G = (_MARGIN * sizes_G).ceil().long()
        some_G = (counts_DG > 0).double().mean(0)
        return GroupFocus(
            least_G=(counts_DG.min(0).values - margin_G).clamp_min(0),
            most_G=torch.minimum(counts_DG.max(0).values + margin_G, sizes_G),
            doubt_G=2 * some_G * (1 - some_G),
        )


class KindQuestion:
    """``group`` for layouts with equal counts: one amount a kind, the same in every layer.

    Args:
        pools: the candidates; attention's hold its next legal step.
        generator: of the round.
    """

    def __init__(self, pools: Pools, generator: torch.Generator) -> None:
        self._pools, self._generator = pools, generator
        table = pools.mask.table
        self._kinds = table.kinds
        # The first group of each kind speaks for all of them.
        self._first = [
            next(at for at, group in enumerate(table.groups) if group.kind == kind)
            for kind in self._kinds
        ]

    def draw(self, pairs: int, focus: None) -> GroupDesign:
        """Masks that treat all layers alike; there is little to focus on."""
        return draw_uniform_masks(self._pools, pairs, self._generator)

    def fit(self, seen: Seen) -> Fit:
        """The posterior of every kind's curve."""
        return fit_curves(
            seen.off_IX[:, self._first] / self._pools.sizes_G[self._first].clamp_min(1),
            seen.loss_I,
            seen.clusters_I,
            self._generator,
            windows_I=seen.windows_I,
        )

    def curves(self, relevance_K: torch.Tensor) -> tuple[Curve, ...]:
        """Each layer's part of its kind's curve."""
        kinds, groups = len(self._kinds), self._pools.mask.table.groups
        curves = []
        for group, members in zip(groups, self._pools.members, strict=True):
            at = self._kinds.index(group.kind)
            layers = sum(other.kind == group.kind for other in groups)
            a, b = float(relevance_K[at]) / layers, float(relevance_K[kinds + at]) / layers
            curves.append(quadratic_curve(group, members, a, b))
        return tuple(curves)

    def loss(self, relevance_K: torch.Tensor, cut: KeepMask) -> float:
        """The kinds' curves where the cut leaves them."""
        gone_G = gone_counts(self._pools.mask, cut)
        amount_G = (gone_G / self._pools.sizes_G.clamp_min(1))[self._first]
        return float(torch.cat([amount_G, amount_G.square()]).double() @ relevance_K)

    def focus(self, cuts: list[KeepMask]) -> None:
        """Nothing: one amount a kind is drawn over its whole range."""


def _asked_together(mask: KeepMask) -> torch.Tensor:
    """The number of each group's question, int64 ``[G]``: experts of a layer share one."""
    numbers: dict[tuple[int, str], int] = {}
    groups = mask.table.groups
    return torch.tensor([numbers.setdefault((g.layer, g.kind), len(numbers)) for g in groups])


def gone_counts(mask: KeepMask, cut: KeepMask) -> torch.Tensor:
    """How many units of each group a cut takes, int64 ``[G]``."""
    return torch.tensor([mask.kept(group) - cut.kept(group) for group in mask.table.groups])


def quadratic_curve(group: UnitGroup, members: torch.Tensor, a: float, b: float) -> Curve:
    """``a t + b t^2`` with t from 0 to 1 over a pool."""
    amount_P = torch.linspace(0, 1, len(members) + 1, dtype=torch.float64)
    return Curve(group=group, order=members, loss=a * amount_P + b * amount_P.square())


def cumulative_curves(pools: Pools, score_N: torch.Tensor) -> tuple[Curve, ...]:
    """Curves that add up the units' scores in the pools' order."""
    curves = []
    for group, members in zip(pools.mask.table.groups, pools.members, strict=True):
        loss = torch.cat([torch.zeros(1, dtype=torch.float64), score_N[members].cumsum(0)])
        curves.append(Curve(group=group, order=members, loss=loss))
    return tuple(curves)
