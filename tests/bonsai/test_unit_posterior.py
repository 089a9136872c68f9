"""The posterior of single units on planted models."""

from __future__ import annotations

import math

import pytest
import torch
from planted import correlation, generator, mask_pairs, noise, pairs, planted_units

from frugal_bonsai.bonsai.masks.regression import Fit
from frugal_bonsai.bonsai.masks.unit_posterior import _condition, _kernels, fit_units


def _fit(off: torch.Tensor, loss: torch.Tensor, prior: torch.Tensor, **more: torch.Tensor) -> Fit:
    return fit_units(off, loss, prior, pairs(len(off)), generator(), **more)


def _zeros(units: int) -> torch.Tensor:
    return torch.zeros(units, dtype=torch.float64)


def test_planted_relevance_is_recovered() -> None:
    off, planted = mask_pairs(200, 20), planted_units(20)
    fit = _fit(off, off.double() @ planted + noise(200, 0.05), _zeros(20))
    assert correlation(fit.relevance_K, planted) > 0.99
    # All masks switch off the same number: the coefficients' mean is not seen, their order is.
    assert fit.r2 > 0.95 and fit.tau > 0.8
    assert fit.penalty.startswith("ridge ")
    assert fit.relevance_K.dtype == torch.float64


def test_prior_as_mean_helps_where_observations_are_few() -> None:
    units = 60
    off, planted = mask_pairs(24, units), planted_units(units)
    loss = off.double() @ planted + noise(24, 0.3)
    prior = planted * (0.7 + 0.6 * torch.rand(units, generator=generator(3)).double())
    without, informed = _fit(off, loss, _zeros(units)), _fit(off, loss, 1000 * prior)
    found = [correlation(f.relevance_K, planted) for f in (without, informed)]
    assert found[0] < 0.8 < found[1]
    assert informed.r2 > without.r2


def test_prior_that_points_the_wrong_way_is_not_followed() -> None:
    off, planted = mask_pairs(400, 10), planted_units(10)
    fit = _fit(off, off.double() @ planted, planted.max() - planted)
    assert correlation(fit.relevance_K, planted) > 0.99


def test_noise_alone_has_no_held_out_r2() -> None:
    fit = _fit(mask_pairs(100, 30), noise(100, 1.0), _zeros(30))
    assert fit.r2 < 0.1 and abs(fit.tau) < 0.3


@pytest.mark.parametrize(("observations", "units"), [(12, 40), (60, 8)])
@pytest.mark.parametrize("penalty", [1e-2, 1.0, 100.0])
def test_dual_equals_primal(observations: int, units: int, penalty: float) -> None:
    """As Bayes' rule has it in coefficient space, with c and a under flat priors."""
    off, planted, prior = (
        mask_pairs(observations, units),
        planted_units(units),
        planted_units(units),
    )
    strata = torch.arange(units) % 2
    prior = prior * torch.where(strata == 0, 1.0, 0.2)
    weights = 0.5 + torch.rand(observations, generator=generator(5)).double()
    loss = off.double() @ planted + noise(observations, 0.2)
    kernel = _kernels(off, prior, strata)[1]
    rows = torch.ones(observations).bool()
    posterior = _condition(kernel, loss, weights, penalty, rows)
    assert len(posterior.beta_F) == 2 and posterior.beta_F[1] > 0
    # Coefficients: the units' deviations from a * prior, the intercept, a.
    z = off.double() - off.double().mean(0)
    design = torch.cat([z, torch.ones(observations, 1).double(), (z @ prior)[:, None]], dim=1)
    precision = torch.cat([1 / kernel.scale_K, _zeros(2)])
    information = design.T @ (design / (penalty * weights)[:, None]) + torch.diag(precision)
    spread = torch.linalg.inv(information)
    solved = spread @ (design.T @ (loss / (penalty * weights)))
    into = torch.cat([torch.eye(units).double(), _zeros(units)[:, None], prior[:, None]], dim=1)
    left = loss - design @ solved
    scale = left @ (left / (penalty * weights)) + solved[:units] @ (
        precision[:units] * solved[:units]
    )
    assert posterior.scale == pytest.approx(float(scale) / (observations - 2), rel=1e-6)
    mean, variance = _mean_and_variance(kernel, posterior, off, prior)
    torch.testing.assert_close(mean, into @ solved, rtol=1e-6, atol=1e-8)
    expected = posterior.scale * (into @ spread @ into.T).diagonal()
    torch.testing.assert_close(variance, expected, rtol=1e-6, atol=1e-10)


def _mean_and_variance(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
    from frugal_bonsai.bonsai.masks.unit_posterior import _coefficients

    return _coefficients(*args)  # type: ignore[arg-type]


def test_variance_says_how_far_the_mean_is_off() -> None:
    """Over planted models, errors in units of the posterior's deviation have size 1."""
    errors = []
    for seed in range(20):
        units = 80
        off = mask_pairs(40, units, seed)
        planted = 1 + noise(units, 0.5, seed + 100)
        loss = off.double() @ planted + noise(40, 1.0, seed + 200)
        fit = _fit(off, loss, torch.ones(units).double())
        assert fit.variance_K is not None
        error = fit.relevance_K - planted
        errors.append((error - error.mean()) / fit.variance_K.sqrt())
    assert 0.8 < float(torch.cat(errors).square().mean().sqrt()) < 1.25


def test_samples_have_the_posterior_s_mean_and_variance() -> None:
    off, planted = mask_pairs(40, 30), planted_units(30)
    fit = _fit(off, off.double() @ planted + noise(40, 0.5), planted_units(30, seed=1))
    assert fit.draw is not None and fit.variance_K is not None
    samples = fit.draw(4000, generator(2))
    deviation = fit.variance_K.sqrt()
    torch.testing.assert_close(
        (samples.mean(0) - fit.relevance_K) / deviation, _zeros(30), rtol=0, atol=0.08
    )
    torch.testing.assert_close(samples.std(0) / deviation, _zeros(30) + 1, rtol=0, atol=0.08)
    assert torch.equal(fit.draw(3, generator(2)), fit.draw(3, generator(2)))


def test_held_out_intervals_cover_what_they_say() -> None:
    off, planted = mask_pairs(300, 40), planted_units(40)
    fit = _fit(off, off.double() @ planted + noise(300, 1.0), _zeros(40))
    assert fit.coverage == pytest.approx(0.9, abs=0.05)


def test_scale_by_layer_and_kind_is_taken_where_the_evidence_has_it() -> None:
    """One stratum's relevances are fifty times the other's, as the prior says; and they are not."""
    strata = torch.arange(60) // 30
    large = torch.where(strata == 0, 1.0, 0.02).double()
    off = mask_pairs(60, 60)
    prior = large * (0.5 + torch.rand(60, generator=generator(4)).double())
    scaled = _fit(
        off, off.double() @ (noise(60, 1.0) * large) + noise(60, 0.1), prior, strata_K=strata
    )
    assert scaled.penalty.endswith("scaled by layer and kind")
    assert scaled.variance_K is not None
    # The quiet ones are known to be quiet; without the scale both would be as uncertain.
    assert scaled.variance_K[:30].mean() > 20 * scaled.variance_K[30:].mean()
    even = _fit(off, off.double() @ noise(60, 1.0) + noise(60, 0.1), prior, strata_K=strata)
    assert not even.penalty.endswith("scaled by layer and kind")


def test_noisy_windows_weigh_less() -> None:
    off, planted = mask_pairs(160, 30), planted_units(30)
    windows = pairs(160) % 4
    loud = torch.where(windows == 0, 8.0, 0.3).double()
    errors = []
    for seed in range(5):
        loss = off.double() @ planted + noise(160, 1.0, seed) * loud
        fits = [_fit(off, loss, _zeros(30)), _fit(off, loss, _zeros(30), windows_I=windows)]
        centred = [f.relevance_K - f.relevance_K.mean() - planted + planted.mean() for f in fits]
        errors.append([float(c.square().mean()) for c in centred])
    even, weighed = torch.tensor(errors).mean(0).tolist()
    assert weighed < 0.6 * even


def test_fits_follow_their_generator_and_clusters_are_any_numbers() -> None:
    off, loss = mask_pairs(30, 8), noise(30, 1.0)
    clusters = 100 * pairs(30) + 7
    fits = [fit_units(off, loss, planted_units(8), clusters, generator(s)) for s in (1, 1, 2)]
    assert fits[0].r2 == fits[1].r2 and torch.equal(fits[0].relevance_K, fits[1].relevance_K)
    assert fits[0].r2 != fits[2].r2


@pytest.mark.parametrize("observations", [2, 4])
def test_few_observations_still_give_coefficients(observations: int) -> None:
    """One pair of masks leaves nothing to hold out: no score, but an answer."""
    off = mask_pairs(observations, 6)
    fit = _fit(off, off.double() @ planted_units(6), planted_units(6))
    assert fit.relevance_K.isfinite().all() and fit.variance_K is not None
    assert fit.variance_K.isfinite().all()
    assert math.isnan(fit.r2) == math.isnan(fit.coverage or 0) == (observations == 2)
    assert observations > 2 or math.isnan(fit.tau)


def test_a_hundred_thousand_units() -> None:
    """Relevances that no 400 masks can tell apart one by one; their uncertainty says so."""
    units, observations = 100_000, 400
    planted = planted_units(units) / 1000
    prior = planted * (0.5 + torch.rand(units, generator=generator(1)).double())
    half = torch.rand(observations // 2, units, generator=generator(2)) < 0.5
    off = torch.stack([half, ~half], dim=1).flatten(0, 1)
    loss = off.double() @ planted
    loss += noise(observations, 0.3 * float(loss.std()))
    fit = _fit(off, loss, prior, strata_K=torch.arange(units) // 2000)
    assert fit.relevance_K.shape == (units,) and fit.variance_K is not None
    assert correlation(fit.relevance_K, planted) > 0.9
    assert fit.r2 > 0.75 and fit.coverage == pytest.approx(0.9, abs=0.05)
    off_by = (fit.relevance_K - planted) / fit.variance_K.sqrt()
    assert 0.8 < float(off_by.square().mean().sqrt()) < 1.25
