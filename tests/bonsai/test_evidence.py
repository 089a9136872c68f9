"""What a round's record keeps of importance and of the regression, by kind and layer."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from plan_shapes import shapes

from frugal_bonsai.bonsai.masks.regression import Fit
from frugal_bonsai.bonsai.masks.sampling import Estimate
from frugal_bonsai.bonsai.selection.curves import cumulative_curve, quadratic_curve

SPEC = shapes(2, 256, 32, 64, 2)


def test_evidence_sums_the_candidates_of_each_layer_and_kind() -> None:
    table = SPEC.table
    score_N = torch.arange(table.units, dtype=torch.float64)
    first, *_, last = table.groups
    orders = [
        torch.arange(table.span(group).start, table.span(group).start + 2)
        for group in (first, last)
    ]
    curves = (
        quadratic_curve(first, orders[0], 0.25, 0.5),
        cumulative_curve(last, orders[1], score_N),
    )
    estimate = Estimate(curves=curves, fit=cast(Fit, object()))
    [importance] = [float(score_N[order].sum()) for order in orders[1:]]
    assert estimate.evidence(score_N) == {
        first.kind: [[first.layer, 1.0, 0.75]],
        last.kind: [[last.layer, pytest.approx(importance), pytest.approx(importance)]],
    }
    assert Estimate(curves=curves).evidence(score_N) == {}  # no masks were evaluated
