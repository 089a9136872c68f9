"""The posterior of the groups' curves on planted models."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import amounts, generator, noise, pairs

from frugal_bonsai.bonsai.masks.curve_posterior import fit_curves
from frugal_bonsai.bonsai.masks.curve_priors import Expected
from frugal_bonsai.bonsai.masks.regression import Fit

A = torch.tensor([0, 1, 2, 0.5, 0, 3]).double()
B = torch.tensor([2, 0, 1, 0.5, 0, 0]).double()


def _loss(amount: torch.Tensor, a: torch.Tensor = A, b: torch.Tensor = B) -> torch.Tensor:
    return amount @ a + amount.square() @ b


def _fit(amount: torch.Tensor, loss: torch.Tensor, **more: object) -> Fit:
    return fit_curves(amount, loss, pairs(len(loss)), generator(), **more)  # type: ignore[arg-type]


def test_planted_curves_are_recovered() -> None:
    amount = amounts(400, 6)
    fit = _fit(amount, _loss(amount) + noise(400, 0.01))
    assert fit.relevance_K.shape == (12,)
    torch.testing.assert_close(fit.relevance_K[:6], A, rtol=0, atol=0.15)
    torch.testing.assert_close(fit.relevance_K[6:], B, rtol=0, atol=0.15)
    assert fit.r2 > 0.99 and fit.tau > 0.9
    assert fit.penalty.startswith("non-negative ridge ")


@given(seed=st.integers(0, 10_000), observations=st.sampled_from([4, 10, 60]))
@settings(max_examples=30, deadline=None)
def test_curves_never_fall(seed: int, observations: int) -> None:
    """Whatever the losses, removing more never looks cheaper, in no sample either."""
    loss = torch.randn(observations, generator=generator(seed), dtype=torch.float64)
    fit = _fit(amounts(observations, 5), loss)
    assert (fit.relevance_K >= 0).all() and fit.relevance_K.isfinite().all()
    assert fit.draw is not None
    samples = fit.draw(3, generator(seed))
    assert samples.shape == (3, 10) and (samples >= 0).all() and samples.isfinite().all()


def test_variance_is_that_of_the_weighted_least_squares_where_no_bound_binds() -> None:
    """Repeated noise on the same masks: the estimates vary as one fit says they do."""
    amount, a, b = amounts(200, 3), torch.ones(3).double() * 4, torch.ones(3).double() * 4
    fits = [_fit(amount, _loss(amount, a, b) + noise(200, 0.3, seed)) for seed in range(60)]
    found = torch.stack([f.relevance_K for f in fits])
    stated = torch.stack([f.variance_K for f in fits if f.variance_K is not None]).mean(0)
    assert len(fits) == 60
    torch.testing.assert_close(found.var(0) / stated, torch.ones(6).double(), rtol=0, atol=0.5)


def test_samples_scatter_as_the_variance_says_and_stop_at_the_bound() -> None:
    amount = amounts(200, 3)
    a, b = torch.tensor([4, 4, 0]).double(), torch.tensor([4, 4, 0]).double()
    fit = _fit(amount, _loss(amount, a, b) + noise(200, 0.3))
    assert fit.draw is not None and fit.variance_K is not None
    samples = fit.draw(2000, generator(1))
    free = torch.tensor([0, 1, 3, 4])
    deviation = fit.variance_K.sqrt()
    torch.testing.assert_close(
        samples.std(0)[free] / deviation[free], torch.ones(4).double(), rtol=0, atol=0.25
    )
    assert ((samples.mean(0) - fit.relevance_K).abs() < 0.6 * deviation)[free].all()
    assert (samples[:, 2] == 0).double().mean() > 0.2
    assert torch.equal(fit.draw(3, generator(2)), fit.draw(3, generator(2)))


def test_held_out_intervals_cover_what_they_say() -> None:
    amount = amounts(600, 6)
    fit = _fit(amount, _loss(amount) + noise(600, 0.5))
    assert fit.coverage == pytest.approx(0.9, abs=0.04)


def test_noisy_windows_weigh_less() -> None:
    amount, windows = amounts(160, 6), pairs(160) % 4
    loud = torch.where(windows == 0, 6.0, 0.2).double()
    errors = []
    for seed in range(5):
        loss = _loss(amount) + noise(160, 1.0, seed) * loud
        fits = [_fit(amount, loss), _fit(amount, loss, windows_I=windows)]
        total = [f.relevance_K[:6] + f.relevance_K[6:] for f in fits]
        errors.append([float((t - A - B).square().mean()) for t in total])
    even, weighed = torch.tensor(errors).mean(0).tolist()
    assert weighed < 0.6 * even


def test_statistics_that_hold_are_followed_where_masks_are_few() -> None:
    groups = 40
    a = (0.2 + torch.rand(groups, generator=generator(3)).double()).square()
    b = 0.5 * a
    kinds = ["attention", "ffn"] * (groups // 2)
    factor = torch.tensor([5.0, 0.2] * (groups // 2)).double()
    curve = torch.cat([a * factor, b * factor])
    amount = amounts(60, groups)
    loss = _loss(amount, a, b) + noise(60, 0.3)
    blind = _fit(amount, loss, kinds_G=kinds)
    informed = _fit(
        amount, loss, kinds_G=kinds, expected=[Expected(curve_K=curve, name="the statistics")]
    )
    assert "around the statistics" in informed.penalty
    errors = [
        float((f.relevance_K[:groups] + f.relevance_K[groups:] - a - b).square().mean())
        for f in (blind, informed)
    ]
    assert errors[1] < 0.5 * errors[0] and informed.r2 > blind.r2


def test_statistics_that_mislead_are_not_followed() -> None:
    amount = amounts(120, 6)
    loss = _loss(amount) + noise(120, 0.2)
    kinds = ["ffn"] * 6
    wrong = Expected(curve_K=torch.cat([A.flip(0), B.flip(0)]), name="the statistics")
    blind = _fit(amount, loss, kinds_G=kinds)
    misled = _fit(amount, loss, kinds_G=kinds, expected=[wrong])
    assert "statistics" not in misled.penalty
    assert torch.equal(blind.relevance_K, misled.relevance_K)


@pytest.mark.parametrize("observations", [2, 4])
def test_few_observations_still_give_coefficients(observations: int) -> None:
    """One pair of masks leaves nothing to hold out: no score, but an answer."""
    amount = amounts(observations, 3)
    fit = _fit(amount, noise(observations, 1.0).abs(), windows_I=pairs(observations))
    assert fit.relevance_K.isfinite().all()
    assert math.isnan(fit.r2) == (observations == 2)
    assert observations > 2 or math.isnan(fit.tau)


def test_a_group_that_no_mask_touches_is_like_the_others_of_its_kind() -> None:
    """Not free: a cut would take all of it."""
    amount = amounts(80, 6)
    amount[:, 2] = 0
    a, b = torch.full((6,), 2.0).double(), torch.full((6,), 1.0).double()
    fit = _fit(amount, _loss(amount, a, b) + noise(80, 0.1), kinds_G=["ffn"] * 6)
    total = fit.relevance_K[:6] + fit.relevance_K[6:]
    assert float(total[2]) == pytest.approx(3.0, abs=0.3)
