"""Common parts of the regressions: folds, held-out predictions, scores and the result.

In: observations, and a function that predicts some of them from the others. Out: R2, Kendall's tau
and the coverage of the stated intervals, which tell the user whether to trust a fit. The
regressions themselves are in curve_regression.py (a curve per group) and paper.py (a coefficient
per unit). Everything is float64 on the CPU and as large as the observations.

Shape suffixes: I observations, K coefficients, D posterior samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

FOLDS = 5
# Half the width of a 90% interval of a normal distribution, in standard deviations.
_HALF_WIDTH = 1.6449

# Draws posterior samples [D, K] of the coefficients: (D, generator) -> samples.
Draw = Callable[[int, torch.Generator], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted regression.

    Attributes:
        relevance_K: Coefficients, float64: the predicted increase of the loss when the unit (or
            the amount) of that coefficient is removed.
        r2: Coefficient of determination on held-out folds; NaN with too few observations.
        tau: Kendall's tau between predicted and observed losses on held-out folds.
        penalty: The chosen penalty in words, for the report.
        draw: Draws posterior samples of all coefficients; None for a point estimate.
        coverage: Share of held-out observations inside their own 90% interval; NaN with too few
            observations, None for a point estimate.
    """

    relevance_K: torch.Tensor
    r2: float
    tau: float
    penalty: str
    draw: Draw | None = None
    coverage: float | None = None


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Held-out predictions; NaN where nothing could be held out.

    Attributes:
        mean_I: Prediction of each observation by a fit without its fold, float64.
        variance_I: Variance of that prediction, including the noise of the observation.
    """

    mean_I: torch.Tensor
    variance_I: torch.Tensor


def fold_of(clusters_I: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a fold for each observation; a mask and its complement (one cluster) share it."""
    _, index_I = torch.unique(clusters_I, return_inverse=True)
    count = int(index_I.max()) + 1
    shuffled = torch.randperm(count, generator=generator) % min(FOLDS, count)
    return shuffled[index_I]


def held_out(
    predict: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    folds_I: torch.Tensor,
) -> Predicted:
    """Predict every observation from the other folds.

    Args:
        predict: Takes the rows to fit and the rows to predict (bool ``[I]`` each) and returns mean
            and variance of the latter.
        folds_I: Fold of each observation. With a single fold nothing is held out.
    """
    mean_I = torch.full((len(folds_I),), torch.nan, dtype=torch.float64)
    variance_I = mean_I.clone()
    folds = sorted(set(folds_I.tolist()))
    for fold in folds if len(folds) > 1 else []:
        out_I = folds_I == fold
        mean_I[out_I], variance_I[out_I] = predict(~out_I, out_I)
    return Predicted(mean_I=mean_I, variance_I=variance_I)


def scores(predicted_I: torch.Tensor, loss_I: torch.Tensor) -> tuple[float, float]:
    """Return R2 and Kendall's tau of predictions."""
    from scipy.stats import kendalltau

    total = (loss_I - loss_I.mean()).square().sum()
    r2 = float(1 - (loss_I - predicted_I).square().sum() / total) if total > 0 else float("nan")
    return r2, float(kendalltau(predicted_I.numpy(), loss_I.numpy()).statistic)


def coverage(predicted: Predicted, loss_I: torch.Tensor) -> float:
    """Return the share of observations inside their 90% interval; NaN if nothing was held out."""
    if predicted.mean_I.isnan().any():
        return float("nan")
    reach_I = _HALF_WIDTH * predicted.variance_I.sqrt()
    return float(((loss_I - predicted.mean_I).abs() <= reach_I).double().mean())
