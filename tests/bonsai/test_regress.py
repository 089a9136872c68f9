"""Folds, scores and coverage."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import generator, noise

from frugal_bonsai.bonsai.masks.regression import (
    FOLDS,
    Predicted,
    coverage,
    fold_of,
    held_out,
    scores,
)


@given(pairs=st.integers(1, 40), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_mask_and_complement_share_a_fold(pairs: int, seed: int) -> None:
    clusters = torch.arange(2 * pairs) // 2
    folds = fold_of(clusters, generator(seed))
    assert torch.equal(folds[::2], folds[1::2])
    assert set(folds.tolist()) == set(range(min(FOLDS, pairs)))
    sizes = folds.bincount()
    assert sizes.max() - sizes.min() <= 2


def test_held_out_predictions_never_saw_their_rows() -> None:
    folds = torch.arange(10) % 5
    out = []

    def predict(fitted: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert torch.equal(fitted, ~rest) and int(fitted.sum()) == 8
        out.append(rest)
        rows = rest.nonzero().flatten().double()
        return 2 * rows, rows + 1

    predicted = held_out(predict, folds)
    assert predicted.mean_I.tolist() == [2.0 * i for i in range(10)]
    assert predicted.variance_I.tolist() == [i + 1.0 for i in range(10)]
    assert torch.stack(out).sum(0).tolist() == [1] * 10


def test_one_fold_predicts_nothing() -> None:
    predicted = held_out(lambda fitted, out: (fitted, out), torch.zeros(4).long())
    assert predicted.mean_I.isnan().all() and math.isnan(coverage(predicted, torch.ones(4)))


def test_scores() -> None:
    loss = torch.tensor([1.0, 2.0, 3.0, 5.0]).double()
    assert scores(loss, loss) == (1.0, 1.0)
    r2, tau = scores(-loss, loss)
    assert r2 < 0 and tau == pytest.approx(-1.0)
    r2, tau = scores(loss.mean().expand(4).clone(), loss)
    assert r2 == pytest.approx(0.0) and math.isnan(tau)
    assert math.isnan(scores(loss, torch.ones(4).double())[0])


def _predicted(variance: float, count: int = 4000) -> Predicted:
    mean = torch.zeros(count, dtype=torch.float64)
    return Predicted(mean_I=mean, variance_I=torch.full_like(mean, variance))


def test_coverage_is_the_share_inside_ninety_per_cent() -> None:
    loss = noise(4000, 2.0)
    assert coverage(_predicted(4.0), loss) == pytest.approx(0.9, abs=0.015)
    assert coverage(_predicted(1.0), loss) == pytest.approx(0.589, abs=0.02)
    assert coverage(_predicted(16.0), loss) > 0.99
