"""The regression of the groups' curves on planted models."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import amounts, generator, noise, pairs

from frugal_bonsai.bonsai.masks.curve_regression import SPREADS, fit_curves
from frugal_bonsai.bonsai.masks.regression import Fit

A = torch.tensor([0, 1, 2, 0.5, 0, 3]).double()
B = torch.tensor([2, 0, 1, 0.5, 0, 0]).double()


def _loss(amount: torch.Tensor, a: torch.Tensor = A, b: torch.Tensor = B) -> torch.Tensor:
    return amount @ a + amount.square() @ b


def _fit(amount: torch.Tensor, loss: torch.Tensor, kinds: list[str] | None = None) -> Fit:
    kinds = kinds or ["ffn"] * amount.shape[1]
    return fit_curves(amount, loss, pairs(len(loss)), generator(), kinds_G=kinds)


def test_planted_curves_are_recovered() -> None:
    amount = amounts(400, 6)
    fit = _fit(amount, _loss(amount) + noise(400, 0.01))
    assert fit.relevance_K.shape == (12,)
    torch.testing.assert_close(fit.relevance_K[:6], A, rtol=0, atol=0.15)
    torch.testing.assert_close(fit.relevance_K[6:], B, rtol=0, atol=0.15)
    assert fit.r2 > 0.99 and fit.tau > 0.9
    assert fit.penalty == "non-negative ridge around each kind's mean, spread 3"


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


def test_samples_scatter_as_repeated_fits_do_and_stop_at_the_bound() -> None:
    """Repeated noise on the same masks: the estimates vary as the samples of one fit do."""
    amount = amounts(200, 3)
    a, b = torch.tensor([4, 4, 0]).double(), torch.tensor([4, 4, 0]).double()
    fits = [_fit(amount, _loss(amount, a, b) + noise(200, 0.3, seed)) for seed in range(40)]
    found = torch.stack([fit.relevance_K for fit in fits])
    draw = fits[0].draw
    assert draw is not None
    samples = draw(2000, generator(1))
    free = torch.tensor([0, 1, 3, 4])
    ratio = samples.std(0)[free] / found.std(0)[free]
    torch.testing.assert_close(ratio, torch.ones(4).double(), rtol=0, atol=0.4)
    assert ((samples.mean(0) - fits[0].relevance_K).abs() < 0.6 * samples.std(0))[free].all()
    assert (samples[:, 2] == 0).double().mean() > 0.2
    assert torch.equal(draw(3, generator(2)), draw(3, generator(2)))


def test_held_out_intervals_cover_what_they_say() -> None:
    amount = amounts(600, 6)
    fit = _fit(amount, _loss(amount) + noise(600, 0.5))
    assert fit.coverage == pytest.approx(0.9, abs=0.04)


def test_few_masks_pull_groups_to_the_mean_of_their_kind() -> None:
    """The error of a fit towards the kinds' means is far below that of a free one."""
    groups = 40
    kinds = ["attention", "ffn"] * (groups // 2)
    size = torch.tensor([4.0, 0.5] * (groups // 2)).double()
    amount = amounts(60, groups)
    loss = _loss(amount, size, 0.5 * size) + noise(60, 0.3)
    errors = []
    for names in (kinds, [f"{kind} {at}" for at, kind in enumerate(kinds)]):
        fit = _fit(amount, loss, names)
        total = fit.relevance_K[:groups] + fit.relevance_K[groups:]
        errors.append(float((total - 1.5 * size).square().mean()))
    assert errors[0] < 0.1 * errors[1]


def test_the_spread_follows_how_much_groups_differ() -> None:
    amount, kinds = amounts(400, 6), ["ffn"] * 6
    alike = torch.full((6,), 2.0).double()
    found = []
    for a in (alike, torch.tensor([0.1, 0.2, 0.2, 6.0, 9.0, 0.1]).double()):
        fit = _fit(amount, _loss(amount, a, 0 * a) + noise(400, 0.5), kinds)
        found.append(float(fit.penalty.split()[-1]))
    assert found[0] < found[1]
    assert set(found) <= set(SPREADS)


def test_a_kind_that_seems_to_cost_nothing_may_still_cost_something() -> None:
    """Its mean is zero, but evidence for one of its groups is not ignored."""
    amount, kinds = amounts(200, 4), ["attention", "attention", "ffn", "ffn"]
    a = torch.tensor([0.0, 0.2, 3.0, 3.0]).double()
    fit = _fit(amount, _loss(amount, a, 0 * a) + noise(200, 0.01), kinds)
    total = fit.relevance_K[:4] + fit.relevance_K[4:]
    torch.testing.assert_close(total, a, rtol=0, atol=0.1)


@pytest.mark.parametrize("observations", [2, 4])
def test_few_observations_still_give_coefficients(observations: int) -> None:
    """One pair of masks leaves nothing to hold out: no score, but an answer."""
    amount = amounts(observations, 3)
    fit = _fit(amount, noise(observations, 1.0).abs())
    assert fit.relevance_K.isfinite().all()
    assert math.isnan(fit.r2) == (observations == 2)
    assert observations > 2 or math.isnan(fit.tau)


def test_a_group_that_no_mask_touches_is_like_the_others_of_its_kind() -> None:
    """Not free: a cut would take all of it."""
    amount = amounts(80, 6)
    amount[:, 2] = 0
    a, b = torch.full((6,), 2.0).double(), torch.full((6,), 1.0).double()
    fit = _fit(amount, _loss(amount, a, b) + noise(80, 0.1))
    total = fit.relevance_K[:6] + fit.relevance_K[6:]
    assert float(total[2]) == pytest.approx(3.0, abs=0.3)


def test_a_kind_that_no_mask_touches_costs_a_typical_observation() -> None:
    """Not free: two pairs of masks of the uniform layout switch off no heads."""
    amount, kinds = amounts(4, 4), ["attention", "attention", "ffn", "ffn"]
    amount[:, :2] = 0
    loss = torch.tensor([0.4, 0.1, 0.3, 0.2]).double()
    fit = _fit(amount, loss, kinds)
    total = fit.relevance_K[:4] + fit.relevance_K[4:]
    typical = float(loss.square().mean().sqrt())
    assert torch.allclose(total[:2], torch.full((2,), typical).double(), rtol=0.3)


def test_few_noisy_masks_do_not_make_a_kind_free() -> None:
    """Its mean curve is zero by chance: the standard error of the mean keeps a cost."""
    amount, kinds = amounts(8, 4), ["attention", "attention", "ffn", "ffn"]
    loss = amount[:, 2:].sum(1) - 0.5 * amount[:, :2].sum(1) + noise(8, 1.0)
    few = _fit(amount, loss, kinds).relevance_K[:2].sum()
    amount = amounts(400, 4)
    loss = amount[:, 2:].sum(1) - 0.5 * amount[:, :2].sum(1) + noise(400, 1.0)
    many = _fit(amount, loss, kinds).relevance_K[:2].sum()
    assert few > 0.05 and many < 0.5 * few
