"""What every regression shares: folds, held-out scores, the noise of each window, the result.

In: observations and held-out predictions. Out: R2, Kendall's tau and the coverage of the stated
uncertainty, which say whether to trust a fit; a noise variance for every window. The regressions
are in unit_posterior.py (one coefficient a unit), curve_posterior.py (one curve a group) and
paper_regression.py (the published one). Closed forms in float64 on the CPU.

Shape suffixes: I observations, K coefficients, D posterior samples, W windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

FOLDS = 5
# Share of held-out observations that should lie within the stated interval, and the interval's half
# width in standard deviations of a normal distribution.
COVERED, _HALF_WIDTH = 0.9, 1.6449

# Posterior samples [D, K] of the coefficients.
Draw = Callable[[int, torch.Generator], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted regression.

    Attributes:
        relevance_K: predicted loss increase when the coefficient's unit (or amount) goes, float64.
        variance_K: posterior variance of each coefficient, float64; None for a point estimate.
        draw: draws posterior samples of all coefficients; None for a point estimate.
        r2: on held-out folds, NaN where there are too few observations.
        tau: Kendall's tau between predicted and observed, on held-out folds.
        coverage: share of held-out observations inside their own 90% interval; NaN where there are
            too few, None for a point estimate.
        penalty: what was chosen on held-out folds, in words for the report.
    """

    relevance_K: torch.Tensor
    r2: float
    tau: float
    penalty: str
    variance_K: torch.Tensor | None = None
    draw: Draw | None = None
    coverage: float | None = None


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Held-out predictions, NaN where nothing could be held out.

    Attributes:
        mean_I: of each observation, from the folds that it is not in.
        variance_I: of the prediction, the observation's own noise included.
    """

    mean_I: torch.Tensor
    variance_I: torch.Tensor


def fold_of(clusters_I: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A fold for each observation; a mask and its complement (one cluster) share a fold."""
    _, index_I = torch.unique(clusters_I, return_inverse=True)
    count = int(index_I.max()) + 1
    shuffled = torch.randperm(count, generator=generator) % min(FOLDS, count)
    return shuffled[index_I]


def held_out(
    predict: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    folds_I: torch.Tensor,
) -> Predicted:
    """Predict every observation from the folds that it is not in.

    Args:
        predict: from the rows to fit on and the rows to predict (bool ``[I]`` each) to mean and
            variance of the latter.
        folds_I: of each observation; with one fold nothing is held out.
    """
    mean_I = torch.full((len(folds_I),), torch.nan, dtype=torch.float64)
    variance_I = mean_I.clone()
    folds = sorted(set(folds_I.tolist()))
    for fold in folds if len(folds) > 1 else []:
        out_I = folds_I == fold
        mean_I[out_I], variance_I[out_I] = predict(~out_I, out_I)
    return Predicted(mean_I=mean_I, variance_I=variance_I)


def scores(predicted_I: torch.Tensor, loss_I: torch.Tensor) -> tuple[float, float]:
    """R2 and Kendall's tau of predictions."""
    from scipy.stats import kendalltau

    total = (loss_I - loss_I.mean()).square().sum()
    r2 = float(1 - (loss_I - predicted_I).square().sum() / total) if total > 0 else float("nan")
    return r2, float(kendalltau(predicted_I.numpy(), loss_I.numpy()).statistic)


def coverage(predicted: Predicted, loss_I: torch.Tensor) -> float:
    """Share of observations inside their 90% interval; NaN where nothing was held out."""
    if predicted.mean_I.isnan().any():
        return float("nan")
    reach_I = _HALF_WIDTH * predicted.variance_I.sqrt()
    return float(((loss_I - predicted.mean_I).abs() <= reach_I).double().mean())


def log_density(predicted: Predicted, loss_I: torch.Tensor) -> torch.Tensor:
    """Log density of each observation under its prediction; NaN where nothing was held out."""
    variance_I = predicted.variance_I
    left_I = (loss_I - predicted.mean_I).square() / variance_I
    density_I: torch.Tensor = -0.5 * (left_I + (2 * torch.pi * variance_I).log())
    return density_I


def clearly_likelier(density_I: torch.Tensor, than_I: torch.Tensor) -> bool:
    """Whether held-out observations are likelier by more than a standard error.

    What knows more has more ways to look right by chance; few observations cannot tell.
    """
    gain_I = density_I - than_I
    return bool(gain_I.mean() > gain_I.std() / len(gain_I) ** 0.5)


def window_noise(residual_I: torch.Tensor, windows_I: torch.Tensor) -> torch.Tensor:
    """Each observation's noise variance relative to the mean, float64 ``[I]``: by its window.

    A window's own mean square residual is shrunk towards that of all: by the share of the variance
    between windows that chance alone gives when all are alike (James and Stein; a squared normal
    residual has twice the square of its mean as variance, estimated here by its own spread inside
    the windows). One window, or one observation a window, gives ones.

    Args:
        residual_I: held-out residuals; NaN (nothing held out) gives ones.
        windows_I: any numbers, equal where the window is.
    """
    even_I = torch.ones(len(residual_I), dtype=torch.float64)
    _, index_I, count_W = torch.unique(windows_I, return_inverse=True, return_counts=True)
    if residual_I.isnan().any() or len(count_W) < 2 or int(count_W.min()) < 2:
        return even_I
    square_I = residual_I.double().square()
    mean = square_I.mean()
    if not mean > 0:
        return even_I
    sum_W = torch.zeros(len(count_W), dtype=torch.float64).index_add_(0, index_I, square_I)
    mean_W = sum_W / count_W
    spare = len(square_I) - len(count_W)
    inside = (square_I - mean_W[index_I]).square().sum() / spare
    by_chance_W = inside / count_W
    between = ((mean_W - mean).square().mean() - by_chance_W.mean()).clamp_min(0)
    trust_W = between / (between + by_chance_W).clamp_min(1e-300)
    noise_W = mean + trust_W * (mean_W - mean)
    noise_I: torch.Tensor = noise_W[index_I]
    return noise_I / noise_I.mean()
