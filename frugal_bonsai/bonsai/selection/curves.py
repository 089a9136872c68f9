"""Curves: the predicted cost of removing units from a group.

In: coefficients or scores of a round's candidates. Out: one :class:`Curve` per group, the form in
which every method hands its estimate to the cut. Holds one number per candidate.

Shape suffixes: P candidates of a group, N units.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from frugal_bonsai.model.units import UnitGroup


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The predicted cost of removing units from one group.

    Attributes:
        group: The group.
        order: Candidates as flat unit indices, the first to go first, int64 ``[P]``.
        loss: Predicted loss increase after removing the first k, float64 ``[P+1]``.
    """

    group: UnitGroup
    order: torch.Tensor
    loss: torch.Tensor


def quadratic_curve(group: UnitGroup, order: torch.Tensor, a: float, b: float) -> Curve:
    """Return ``a t + b t^2`` with t from 0 to 1 over the candidates."""
    amount_P = torch.linspace(0, 1, len(order) + 1, dtype=torch.float64)
    return Curve(group=group, order=order, loss=a * amount_P + b * amount_P.square())


def cumulative_curve(group: UnitGroup, order: torch.Tensor, score_N: torch.Tensor) -> Curve:
    """Return the running sum of the candidates' scores."""
    loss = torch.cat([torch.zeros(1, dtype=torch.float64), score_N[order].cumsum(0)])
    return Curve(group=group, order=order, loss=loss)


def withhold(curves: tuple[Curve, ...], kind: str) -> tuple[Curve, ...]:
    """Return the same curves with no candidates in the groups of one kind."""
    return tuple(
        Curve(group=c.group, order=c.order[:0], loss=c.loss[:1]) if c.group.kind == kind else c
        for c in curves
    )
