"""What is believed of curves before masks."""

from __future__ import annotations

import pytest
import torch

from frugal_bonsai.bonsai.masks.curve_priors import (
    Expected,
    behind_cut,
    by_statistic,
    expected_curve,
    make_beliefs,
)


def test_expected_curve_adds_up_the_pool() -> None:
    assert expected_curve(torch.zeros(0)) == (0.0, 0.0)
    a, b = expected_curve(torch.full((10,), 0.3, dtype=torch.float64))
    assert (a, b) == (pytest.approx(3.0), pytest.approx(0.0, abs=1e-9))
    rising = torch.arange(1, 101, dtype=torch.float64) * 2 / 100**2  # adds up to t^2 and a bit
    a, b = expected_curve(rising)
    assert a + b == pytest.approx(1.01, abs=1e-6) and b > 0.95


def test_statistics_of_all_groups() -> None:
    found = by_statistic([torch.full((4,), 0.5).double(), torch.zeros(0).double()])
    torch.testing.assert_close(found.curve_K, torch.tensor([2.0, 0, 0, 0]).double())


def test_curves_go_on_behind_a_cut() -> None:
    """What k more units of the old pool cost, for a pool of another size."""
    relevance = torch.tensor([3.0, 1.0, 2.0, 0.0]).double()  # a of both groups, then b
    sizes, gone = torch.tensor([20, 4]), torch.tensor([5, 0])

    def loss(units: float) -> float:
        return 3 * units / 20 + 2 * (units / 20) ** 2

    expected = behind_cut(relevance, sizes, gone).expected(torch.tensor([12, 2]))
    a, b = float(expected.curve_K[0]), float(expected.curve_K[2])
    for more in (1, 7, 12):
        found = a * more / 12 + b * (more / 12) ** 2
        assert found == pytest.approx(loss(5 + more) - loss(5))
    assert expected.curve_K[1] == 0.5 and expected.curve_K[3] == 0


def test_shapes_of_the_beliefs() -> None:
    kinds = ["attention", "ffn", "attention", "ffn"]
    curve = torch.arange(1, 9).double()
    beliefs = make_beliefs(8, kinds, [Expected(curve_K=curve, name="x")])
    assert [belief.name for belief in beliefs] == [" around each kind's mean", " around x"]
    # One a and one b for each kind; then one factor for each.
    assert beliefs[0].shape_KF.shape == (8, 4) and beliefs[1].shape_KF.shape == (8, 2)
    means = beliefs[0].shape_KF @ torch.tensor([1.0, 2, 3, 4]).double()
    assert means.tolist() == [1, 2, 1, 2, 3, 4, 3, 4]
    scaled = beliefs[1].shape_KF @ torch.tensor([10.0, 0.5]).double()
    assert scaled.tolist() == [10, 1, 30, 2, 50, 3, 70, 4]
    [unknown] = make_beliefs(8, None, [])
    assert unknown.shape_KF.shape == (8, 0) and unknown.kind_GF.shape == (4, 1)
