"""The regression: relevance from utilities of masked sub-models.

In: a design matrix and one loss increase per observation. Out: coefficients, with the held-out R2
and Kendall's tau that say whether to trust them. Closed forms in float64 on the CPU; the largest
matrix is observations x observations (dual), never units x units.

Differs from the paper: the default is a ridge whose mean is not zero but a multiple of the prior
that is fitted too, and at ``group`` level a non-negative least squares on curves; the paper's own
regression is in paper_regression.py.

Shape suffixes: I observations, K coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

FOLDS = 5
_PENALTIES = tuple(10.0**e for e in range(-3, 5))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted regression.

    Attributes:
        relevance_K: predicted loss increase when the coefficient's unit (or amount) goes, float64.
        r2: on held-out folds, NaN where there are too few observations.
        tau: Kendall's tau between predicted and observed, on held-out folds.
        penalty: the chosen penalty, in words for the report.
    """

    relevance_K: torch.Tensor
    r2: float
    tau: float
    penalty: str


# Fits on training rows, predicts held-out rows: (design, loss, held-out design) -> prediction.
_Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def fold_of(clusters_I: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A fold for each observation; a mask and its complement (one cluster) share a fold."""
    _, index_I = torch.unique(clusters_I, return_inverse=True)
    count = int(index_I.max()) + 1
    shuffled = torch.randperm(count, generator=generator) % min(FOLDS, count)
    return shuffled[index_I]


def held_out(
    predict: _Predict, design_IK: torch.Tensor, loss_I: torch.Tensor, folds_I: torch.Tensor
) -> torch.Tensor:
    """Predictions of every observation from the folds that it is not in; NaN with one fold."""
    predicted_I = torch.full_like(loss_I, torch.nan)
    folds = sorted(set(folds_I.tolist()))
    for fold in folds if len(folds) > 1 else []:
        out_I = folds_I == fold
        predicted_I[out_I] = predict(design_IK[~out_I], loss_I[~out_I], design_IK[out_I])
    return predicted_I


def scores(predicted_I: torch.Tensor, loss_I: torch.Tensor) -> tuple[float, float]:
    """R2 and Kendall's tau of predictions."""
    from scipy.stats import kendalltau

    total = (loss_I - loss_I.mean()).square().sum()
    r2 = float(1 - (loss_I - predicted_I).square().sum() / total) if total > 0 else float("nan")
    return r2, float(kendalltau(predicted_I.numpy(), loss_I.numpy()).statistic)


def fit_ridge(
    off_IK: torch.Tensor,
    loss_I: torch.Tensor,
    prior_K: torch.Tensor,
    clusters_I: torch.Tensor,
    generator: torch.Generator,
) -> Fit:
    """Dual ridge around ``a * prior``, centred; a >= 0 fitted, penalty by cross-validation.

    ``r = a rho + Z^T (Z Z^T + lambda I)^-1 (y - a Z rho)`` with Z, y centred: an I x I solve.

    Args:
        off_IK: 1 where a unit is off.
        loss_I: loss increase of each observation.
        prior_K: the prior of each unit.
        clusters_I: observations that must share a fold.
        generator: for the folds.
    """
    design_IK, loss_I = off_IK.double(), loss_I.double()
    folds_I = fold_of(clusters_I, generator)
    best: tuple[float, float] | None = None
    for penalty in _PENALTIES:

        def predict(
            x: torch.Tensor, y: torch.Tensor, new: torch.Tensor, penalty: float = penalty
        ) -> torch.Tensor:
            relevance_K, centre_K, mean = _solve_ridge(x, y, prior_K, penalty)
            return (new - centre_K) @ relevance_K + mean

        predicted_I = held_out(predict, design_IK, loss_I, folds_I)
        error = float((predicted_I - loss_I).square().mean())
        if best is None or error < best[0]:
            best = (error, penalty)
            r2, tau = scores(predicted_I, loss_I)
    assert best is not None
    relevance_K, _, _ = _solve_ridge(design_IK, loss_I, prior_K, best[1])
    return Fit(relevance_K=relevance_K, r2=r2, tau=tau, penalty=f"ridge {best[1]:g}")


def _solve_ridge(
    design_IK: torch.Tensor, loss_I: torch.Tensor, prior_K: torch.Tensor, penalty: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    centre_K, mean = design_IK.mean(0), loss_I.mean()
    z_IK, y_I = design_IK - centre_K, loss_I - mean
    along_I = z_IK @ prior_K
    scale = (along_I @ y_I / (along_I @ along_I).clamp_min(1e-300)).clamp_min(0)
    kernel_II = z_IK @ z_IK.T
    kernel_II.diagonal().add_(penalty * kernel_II.diagonal().mean().clamp_min(1e-12))
    dual_I = torch.linalg.solve(kernel_II, y_I - scale * along_I)
    return scale * prior_K + z_IK.T @ dual_I, centre_K, mean


def fit_curves(
    amount_IG: torch.Tensor,
    loss_I: torch.Tensor,
    clusters_I: torch.Tensor,
    generator: torch.Generator,
) -> Fit:
    """Non-negative ``loss = sum_g a_g t_g + b_g t_g^2`` with a small ridge, penalty by folds.

    Args:
        amount_IG: t, the share of each group's pool that is off.
        loss_I: loss increase of each observation over the same window without a mask.
        clusters_I: observations that must share a fold.
        generator: for the folds.

    Returns:
        ``relevance_K`` holds all a, then all b (``[2G]``).
    """
    design_IK = torch.cat([amount_IG, amount_IG.square()], dim=1).double()
    loss_I = loss_I.double()
    folds_I = fold_of(clusters_I, generator)
    best: tuple[float, float] | None = None
    for penalty in (1e-4, 1e-3, 1e-2, 1e-1):

        def predict(
            x: torch.Tensor, y: torch.Tensor, new: torch.Tensor, penalty: float = penalty
        ) -> torch.Tensor:
            return new @ _solve_nonnegative(x, y, penalty)

        predicted_I = held_out(predict, design_IK, loss_I, folds_I)
        error = float((predicted_I - loss_I).square().mean())
        if best is None or error < best[0]:
            best = (error, penalty)
            r2, tau = scores(predicted_I, loss_I)
    assert best is not None
    relevance_K = _solve_nonnegative(design_IK, loss_I, best[1])
    return Fit(relevance_K=relevance_K, r2=r2, tau=tau, penalty=f"non-negative ridge {best[1]:g}")


def _solve_nonnegative(
    design_IK: torch.Tensor, loss_I: torch.Tensor, penalty: float
) -> torch.Tensor:
    from scipy.optimize import nnls

    observations, coefficients = design_IK.shape
    ridge = (penalty * observations * design_IK.square().mean()).sqrt()
    padded_IK = torch.cat([design_IK, ridge * torch.eye(coefficients, dtype=torch.float64)])
    target_I = torch.cat([loss_I, torch.zeros(coefficients, dtype=torch.float64)])
    solution, _ = nnls(padded_IK.numpy(), target_I.numpy())
    return torch.from_numpy(solution)
