"""The regressions on planted models."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugal_bonsai.bonsai.regress import (
    FOLDS,
    _solve_ridge,
    fit_curves,
    fit_ridge,
    fold_of,
    held_out,
    scores,
)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _masks(observations: int, units: int, seed: int = 0) -> torch.Tensor:
    """Pairs of complements, half of the units off in each."""
    order = torch.rand(observations // 2, units, generator=_generator(seed)).argsort(1)
    off = order < units // 2
    return torch.stack([off, ~off], dim=1).flatten(0, 1).double()


def _planted(units: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(units, generator=_generator(seed + 50), dtype=torch.float64).square() * 3


def _noise(count: int, size: float) -> torch.Tensor:
    return size * torch.randn(count, generator=_generator(7), dtype=torch.float64)


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


# -- folds and scores -------------------------------------------------------------------------
@given(pairs=st.integers(1, 40), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_mask_and_complement_share_a_fold(pairs: int, seed: int) -> None:
    clusters = torch.arange(2 * pairs) // 2
    folds = fold_of(clusters, _generator(seed))
    assert torch.equal(folds[::2], folds[1::2])
    assert set(folds.tolist()) == set(range(min(FOLDS, pairs)))
    sizes = folds.bincount()
    assert sizes.max() - sizes.min() <= 2


def test_held_out_predictions_never_saw_their_rows() -> None:
    x = torch.arange(10.0)[:, None]
    folds = torch.arange(10) % 5
    seen: list[set[float]] = []

    def predict(train: torch.Tensor, y: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        seen.append(set(train.flatten().tolist()) & set(new.flatten().tolist()))
        assert len(train) == len(y) == 8
        return new[:, 0] * 2

    assert held_out(predict, x, x[:, 0], folds).tolist() == (x[:, 0] * 2).tolist()
    assert seen == [set()] * 5


def test_scores() -> None:
    loss = torch.tensor([1.0, 2.0, 3.0, 5.0]).double()
    assert scores(loss, loss) == (1.0, 1.0)
    r2, tau = scores(-loss, loss)
    assert r2 < 0 and tau == pytest.approx(-1.0)
    r2, tau = scores(loss.mean().expand(4).clone(), loss)
    assert r2 == pytest.approx(0.0) and math.isnan(tau)
    assert math.isnan(scores(loss, torch.ones(4).double())[0])


# -- ridge ------------------------------------------------------------------------------------
def test_planted_relevance_is_recovered() -> None:
    off, planted = _masks(200, 20), _planted(20)
    loss = off @ planted + _noise(200, 0.05)
    fit = fit_ridge(off, loss, torch.zeros(20).double(), torch.arange(200) // 2, _generator())
    assert _correlation(fit.relevance_K, planted) > 0.99
    # All masks switch off the same number: the coefficients' mean is not seen, their order is.
    assert fit.r2 > 0.95 and fit.tau > 0.8
    assert fit.penalty.startswith("ridge ")
    assert fit.relevance_K.dtype == torch.float64


def test_prior_as_mean_helps_where_observations_are_few() -> None:
    units = 60
    off, planted = _masks(24, units), _planted(units)
    loss = off @ planted + _noise(24, 0.3)
    prior = planted * (0.7 + 0.6 * torch.rand(units, generator=_generator(3)).double())
    clusters = torch.arange(24) // 2
    without = fit_ridge(off, loss, torch.zeros(units).double(), clusters, _generator())
    informed = fit_ridge(off, loss, 1000 * prior, clusters, _generator())
    found = [_correlation(f.relevance_K, planted) for f in (without, informed)]
    assert found[0] < 0.8 < found[1]
    assert informed.r2 > without.r2


def test_prior_that_points_the_wrong_way_is_not_followed() -> None:
    off, planted = _masks(400, 10), _planted(10)
    loss = off @ planted
    fit = fit_ridge(off, loss, planted.max() - planted, torch.arange(400) // 2, _generator())
    assert _correlation(fit.relevance_K, planted) > 0.99


def test_noise_alone_has_no_held_out_r2() -> None:
    off = _masks(100, 30)
    fit = fit_ridge(
        off, _noise(100, 1.0), torch.zeros(30).double(), torch.arange(100) // 2, _generator()
    )
    assert fit.r2 < 0.1 and abs(fit.tau) < 0.3


@pytest.mark.parametrize(("observations", "units"), [(12, 40), (60, 8)])
@pytest.mark.parametrize("penalty", [1e-3, 1.0, 100.0])
def test_dual_equals_primal(observations: int, units: int, penalty: float) -> None:
    """r = a rho + (Z^T Z + lambda I)^-1 Z^T (y - a Z rho), solved as an augmented least squares."""
    x, planted = _masks(observations, units), _planted(units)
    y = x @ planted + _noise(observations, 0.2)
    prior = _planted(units, seed=4)
    found, centre, mean = _solve_ridge(x, y, prior, penalty)
    z, target = x - x.mean(0), y - y.mean()
    along = z @ prior
    scale = max(0.0, float(along @ target / (along @ along)))
    weight = penalty * z.square().sum() / observations
    rows = torch.cat([z, weight.sqrt() * torch.eye(units, dtype=torch.float64)])
    left = torch.cat([target - scale * along, torch.zeros(units, dtype=torch.float64)])
    expected = scale * prior + torch.linalg.lstsq(rows, left[:, None]).solution[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(centre, x.mean(0))
    assert float(mean) == pytest.approx(float(y.mean()))


# -- curves -----------------------------------------------------------------------------------
def _amounts(observations: int, groups: int) -> torch.Tensor:
    half = torch.rand(observations // 2, groups, generator=_generator(1), dtype=torch.float64)
    return torch.stack([half, 1 - half], dim=1).flatten(0, 1)


def test_planted_curves_are_recovered() -> None:
    groups = 6
    amount = _amounts(400, groups)
    a, b = torch.tensor([0, 1, 2, 0.5, 0, 3]).double(), torch.tensor([2, 0, 1, 0.5, 0, 0]).double()
    loss = amount @ a + amount.square() @ b + _noise(400, 0.01)
    fit = fit_curves(amount, loss, torch.arange(400) // 2, _generator())
    assert fit.relevance_K.shape == (2 * groups,)
    torch.testing.assert_close(fit.relevance_K[:groups], a, rtol=0, atol=0.15)
    torch.testing.assert_close(fit.relevance_K[groups:], b, rtol=0, atol=0.15)
    assert fit.r2 > 0.99 and fit.tau > 0.9
    assert fit.penalty.startswith("non-negative ridge ")


@given(seed=st.integers(0, 10_000), observations=st.sampled_from([4, 10, 60]))
@settings(max_examples=30, deadline=None)
def test_curves_never_fall(seed: int, observations: int) -> None:
    """Whatever the losses, removing more never looks cheaper."""
    amount = _amounts(observations, 5)
    loss = torch.randn(observations, generator=_generator(seed), dtype=torch.float64)
    fit = fit_curves(amount, loss, torch.arange(observations) // 2, _generator())
    assert (fit.relevance_K >= 0).all() and fit.relevance_K.isfinite().all()


def test_fits_follow_their_generator_and_clusters_are_any_numbers() -> None:
    off, loss = _masks(30, 8), _noise(30, 1.0)
    clusters = 100 * (torch.arange(30) // 2) + 7
    fits = [fit_ridge(off, loss, _planted(8), clusters, _generator(s)) for s in (1, 1, 2)]
    assert fits[0].r2 == fits[1].r2 and torch.equal(fits[0].relevance_K, fits[1].relevance_K)
    assert fits[0].r2 != fits[2].r2


@pytest.mark.parametrize("observations", [2, 4])
def test_few_observations_still_give_coefficients(observations: int) -> None:
    """One pair of masks leaves nothing to hold out: no score, but an answer."""
    off, clusters = _masks(observations, 6), torch.arange(observations) // 2
    loss = off @ _planted(6)
    ridge = fit_ridge(off, loss, _planted(6), clusters, _generator())
    curves = fit_curves(_amounts(observations, 3), loss, clusters, _generator())
    for fit in (ridge, curves):
        assert fit.relevance_K.isfinite().all()
        assert math.isnan(fit.r2) == (observations == 2)
        assert observations > 2 or math.isnan(fit.tau)
