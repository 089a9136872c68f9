"""Estimators: how a level draws masks, fits their losses and turns coefficients into curves.

In: the pools of a round. Out: designs, fits and curves for the loop in sampling.py. An estimator
holds its pools and evaluates nothing itself.

Shape suffixes: N units, G groups, M masks, Q curves, K coefficients, P units of a pool.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from frugal_bonsai.bonsai.masks.curve_regression import fit_curves
from frugal_bonsai.bonsai.masks.design import GroupDesign, Pools, UnitDesign, draw_unit_masks
from frugal_bonsai.bonsai.masks.paper import fit_paper
from frugal_bonsai.bonsai.masks.regression import Fit
from frugal_bonsai.bonsai.masks.sampling import Seen
from frugal_bonsai.bonsai.selection.curves import Curve, cumulative_curve, quadratic_curve
from frugal_bonsai.model.units import KeepMask


class UnitEstimator:
    """``unit`` level: every candidate has its own coefficient (the paper).

    Args:
        pools: The candidates.
        score_N: Importance of each unit.
        generator: Draws masks and folds.
    """

    def __init__(self, pools: Pools, score_N: torch.Tensor, generator: torch.Generator) -> None:
        self._pools, self._score_N, self._generator = pools, score_N, generator
        self._units_K = torch.cat(pools.members)

    def draw(self, pairs: int) -> UnitDesign:
        """Draw masks that switch off half of the candidates."""
        return draw_unit_masks(self._pools, self._score_N, pairs, self._generator)

    def fit(self, seen: Seen) -> Fit:
        """Fit the published regression."""
        return fit_paper(seen.off_IX.double(), seen.loss_I, self._generator)

    def curves(self, relevance_K: torch.Tensor) -> tuple[Curve, ...]:
        """Sum the relevances of each group, lowest first."""
        relevance_N = torch.zeros_like(self._score_N)
        relevance_N[self._units_K] = relevance_K
        members = tuple(m[relevance_N[m].argsort(stable=True)] for m in self._pools.members)
        return importance_curves(Pools(self._pools.mask, members), relevance_N)

    def loss(self, relevance_K: torch.Tensor, cut: KeepMask) -> float:
        """Sum the relevances of the removed units."""
        return float(relevance_K[~cut.keep_N[self._units_K]].sum())


class CurveEstimator:
    """``group`` level: masks estimate a curve of loss against amount, importance orders the units.

    Groups may share a curve: masks then take the same share of each of their pools, and each group
    has an equal part of the fitted loss. The experts of a layer do, because thousands of curves
    cannot be fitted to a few hundred masks; in the uniform layout all layers of a kind do.

    Args:
        pools: The candidates.
        curve_G: The number of each group's curve, int64.
        draw: Draws a design with this many pairs of masks.
        generator: Draws the folds.
    """

    def __init__(
        self,
        pools: Pools,
        curve_G: torch.Tensor,
        draw: Callable[[int], GroupDesign],
        generator: torch.Generator,
    ) -> None:
        self._pools, self._curve_G, self._draw = pools, curve_G, draw
        self._generator = generator
        self._groups_Q = torch.bincount(curve_G)
        # The amounts of a curve are read from its first group.
        places = curve_G.tolist()
        self._first_Q = torch.tensor([places.index(q) for q in range(len(self._groups_Q))])

    def draw(self, pairs: int) -> GroupDesign:
        """Draw masks that take the same share of all pools of a curve."""
        sizes_G = self._pools.sizes_G
        share_MQ = self._amounts(self._draw(pairs).off_MG)[:, self._first_Q]
        return GroupDesign(self._pools, (share_MQ[:, self._curve_G] * sizes_G).round().long())

    def fit(self, seen: Seen) -> Fit:
        """Fit the curves."""
        groups = self._pools.mask.table.groups
        return fit_curves(
            self._amounts(seen.off_IX)[:, self._first_Q],
            seen.loss_I,
            seen.clusters_I,
            self._generator,
            kinds_G=[groups[at].kind for at in self._first_Q.tolist()],
        )

    def curves(self, relevance_K: torch.Tensor) -> tuple[Curve, ...]:
        """Evaluate each group's part of its curve at every whole number of units."""
        a_G, b_G = self._parts(relevance_K)
        groups, members = self._pools.mask.table.groups, self._pools.members
        return tuple(
            quadratic_curve(group, mine, float(a), float(b))
            for group, mine, a, b in zip(groups, members, a_G, b_G, strict=True)
        )

    def loss(self, relevance_K: torch.Tensor, cut: KeepMask) -> float:
        """Evaluate the curves at the amounts that a cut takes."""
        amount_G = self._amounts(gone_counts(self._pools.mask, cut))
        a_G, b_G = self._parts(relevance_K)
        return float(amount_G @ a_G + amount_G.square() @ b_G)

    def _amounts(self, off_XG: torch.Tensor) -> torch.Tensor:
        """Return counts of units as shares of their pools, float64."""
        return off_XG.double() / self._pools.sizes_G.clamp_min(1)

    def _parts(self, relevance_K: torch.Tensor) -> torch.Tensor:
        """Return each group's part of its curve, ``[2, G]`` of ``[2Q]``."""
        return (relevance_K.view(2, -1) / self._groups_Q)[:, self._curve_G]


def gone_counts(mask: KeepMask, cut: KeepMask) -> torch.Tensor:
    """Return the number of units of each group that a cut removes, int64 ``[G]``."""
    return torch.tensor([mask.kept(group) - cut.kept(group) for group in mask.table.groups])


def importance_curves(pools: Pools, score_N: torch.Tensor) -> tuple[Curve, ...]:
    """Return curves that sum the units' scores in the order of the pools."""
    groups = pools.mask.table.groups
    return tuple(
        cumulative_curve(group, members, score_N)
        for group, members in zip(groups, pools.members, strict=True)
    )
