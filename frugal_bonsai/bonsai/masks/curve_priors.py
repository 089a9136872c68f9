"""What may be believed of the groups' curves before a round's masks: the mean of their posterior.

In: the kind of each group, the prior, the last round's curves. Out: shapes whose sizes the
regression (curve_posterior.py) fits: the same curve for all groups of a kind, the prior added up
over each pool, the last round's curves continued behind its cut. Holds two numbers a group and
kind.

Shape suffixes: G groups, K coefficients (all a, then all b), F kinds, P units of a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What is expected of every group, up to a factor a kind.

    Attributes:
        curve_K: coefficients of the groups' curves, in a measure of their own.
        name: where it comes from, for the report.
    """

    curve_K: torch.Tensor
    name: str


def expected_curve(score_P: torch.Tensor) -> tuple[float, float]:
    """Coefficients a, b of the curve nearest to the cumulated statistic of a pool, lowest first."""
    from scipy.optimize import nnls

    if not len(score_P):
        return 0.0, 0.0
    amount_P = torch.linspace(0, 1, len(score_P) + 1, dtype=torch.float64)[1:]
    basis = torch.stack([amount_P, amount_P.square()], dim=1)
    (a, b), _ = nnls(basis.numpy(), score_P.double().cumsum(0).numpy())
    return float(a), float(b)


def by_statistic(scores: Sequence[torch.Tensor]) -> Expected:
    """What the statistic makes of every group's curve: its sum over the pool, lowest first.

    Args:
        scores: of each group's pool, lowest first, ``[P]`` each.
    """
    curves = [expected_curve(score_P) for score_P in scores]
    coefficients = [a for a, _ in curves] + [b for _, b in curves]
    return Expected(curve_K=torch.tensor(coefficients, dtype=torch.float64), name="the statistics")


class Ahead(NamedTuple):
    """Foretold loss of k more units of each group: ``linear k + square k^2``."""

    linear: list[float]
    square: list[float]

    def expected(self, sizes_G: torch.Tensor) -> Expected:
        """For the pools of the next round."""
        linear_G = torch.tensor(self.linear, dtype=torch.float64) * sizes_G
        square_G = torch.tensor(self.square, dtype=torch.float64) * sizes_G.square()
        return Expected(curve_K=torch.cat([linear_G, square_G]), name="the last round's curves")


def behind_cut(relevance_K: torch.Tensor, sizes_G: torch.Tensor, gone_G: torch.Tensor) -> Ahead:
    """The curves behind a cut that takes ``gone_G`` of each group's pool, from there on.

    ``a t + b t^2`` with t = (gone + k) / size, less its value at the cut, in powers of k.
    """
    groups = len(sizes_G)
    a_G, b_G = relevance_K[:groups], relevance_K[groups:]
    size_G = sizes_G.clamp_min(1).double()
    linear_G = (a_G + 2 * b_G * gone_G / size_G) / size_G
    return Ahead(linear_G.tolist(), (b_G / size_G.square()).tolist())


@dataclass(frozen=True, kw_only=True)
class Belief:
    """What is believed of the coefficients before any mask.

    Attributes:
        shape_KF: the mean is this times factors >= 0 that are fitted; ``[K, 0]`` for zero.
        kind_GF: 1 where a group is of a kind; each has a penalty of its own.
        name: for the report.
    """

    shape_KF: torch.Tensor
    kind_GF: torch.Tensor
    name: str


def make_beliefs(
    coefficients: int, kinds_G: Sequence[str] | None, expected: Sequence[Expected]
) -> list[Belief]:
    """Nothing known, or groups of a kind alike; and what is expected besides."""
    groups = coefficients // 2
    if kinds_G is None:
        nothing = torch.zeros(coefficients, 0, dtype=torch.float64)
        return [Belief(shape_KF=nothing, kind_GF=torch.ones(groups, 1).double(), name="")]
    mine = [[float(kind == other) for kind in kinds_G] for other in sorted(set(kinds_G))]
    mine_GF = torch.tensor(mine, dtype=torch.float64).T
    none_GF = torch.zeros_like(mine_GF)
    alike_KF = torch.cat([torch.cat([mine_GF, none_GF], 1), torch.cat([none_GF, mine_GF], 1)])
    beliefs = [Belief(shape_KF=alike_KF, kind_GF=mine_GF, name=" around each kind's mean")]
    for one in expected:
        shape_KF = one.curve_K[:, None] * mine_GF.repeat(2, 1)
        beliefs.append(Belief(shape_KF=shape_KF, kind_GF=mine_GF, name=f" around {one.name}"))
    return beliefs
