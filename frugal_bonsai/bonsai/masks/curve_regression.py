"""``group`` level: the regression of one curve per group, ``loss = a t + b t^2`` with a, b >= 0.

In: the share t of each group's pool that every mask switches off, and one loss increase per
observation. Out: the coefficients, posterior samples of them and held-out scores.

The model is a non-negative ridge towards the mean curve of the group's kind:

    loss = X c + noise,   c >= 0,   c_g ~ N(m, (spread * size)^2),

where X holds t and t^2 of every group, m is the curve that fits best when all groups of a kind
share one, and size is m's loss at t = 1, or the standard error of that loss if it is larger. Groups
without evidence therefore cost what their kind costs on average, and a kind is not taken to be free
because a few observations put its mean curve at zero. ``spread`` is the typical deviation of a
group from its kind as a share of the mean; it is chosen from :data:`SPREADS` by the squared error
on held-out folds. The mode is non-negative least squares. Posterior samples solve the same problem
with perturbed observations and perturbed means (randomise, then optimise: Bardsley et al. 2014), so
that bounds hold in every sample. Memory is quadratic in the coefficients.

Shape suffixes: I observations, G groups, F kinds, K coefficients (all a, then all b), R rows of a
least-squares problem, D posterior samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.masks.regression import (
    Fit,
    Predicted,
    coverage,
    fold_of,
    held_out,
    scores,
)

# Candidate deviations of a group from its kind's mean curve, as a share of that curve.
SPREADS = (0.3, 1.0, 3.0)
# Used when there are too few observations to hold any out.
_USUAL_SPREAD = 0.3
# Smallest size of a kind's mean curve, as a share of the largest one or of a typical observation.
_LEAST_SIZE = 0.01
# Samples whose mean is reported as the posterior mean within the bounds.
_DRAWS = 64


def fit_curves(
    amount_IG: torch.Tensor,
    loss_I: torch.Tensor,
    clusters_I: torch.Tensor,
    generator: torch.Generator,
    *,
    kinds_G: Sequence[str],
) -> Fit:
    """Fit the curves of all groups.

    Args:
        amount_IG: t, the share of each group's pool that is off, in [0, 1].
        loss_I: Loss increase of each observation over the same window without a mask.
        clusters_I: Observations of one cluster share a fold.
        generator: Draws the folds and the samples whose mean is returned.
        kinds_G: The kind of each group; groups of one kind share a mean curve.

    Returns:
        ``relevance_K`` holds all a, then all b, float64 ``[2G]``: the posterior mean within the
        bounds. The mode would put groups with little evidence at zero, and the cut would take them
        first.
    """
    design_IK = torch.cat([amount_IG, amount_IG.square()], dim=1).double()
    loss_I = loss_I.double()
    kinds = sorted(set(kinds_G))
    member_GF = torch.tensor([[float(k == kind) for kind in kinds] for k in kinds_G]).double()
    folds_I = fold_of(clusters_I, generator)
    predicted = {
        spread: _predict_held_out(design_IK, loss_I, member_GF, folds_I, spread)
        for spread in SPREADS
    }
    errors = {s: float((p.mean_I - loss_I).square().sum()) for s, p in predicted.items()}
    spread = min(SPREADS, key=errors.__getitem__)
    if math.isnan(errors[spread]):
        spread = _USUAL_SPREAD
    posterior = _fit(design_IK, loss_I, member_GF, spread)
    r2, tau = scores(predicted[spread].mean_I, loss_I)
    return Fit(
        relevance_K=posterior.draw(_DRAWS, generator).mean(0),
        draw=posterior.draw,
        r2=r2,
        tau=tau,
        coverage=coverage(predicted[spread], loss_I),
        penalty=f"non-negative ridge around each kind's mean, spread {spread:g}",
    )


@dataclass(frozen=True, kw_only=True)
class _Posterior:
    """The coefficients given observations.

    Attributes:
        mode_K: Most probable coefficients within the bounds.
        covariance_KK: Covariance without the bounds.
        noise: Variance of the noise of an observation.
        rows_KK: Triangular least-squares problem of the mode, with the ridge's rows included.
        target_K: Its right-hand side.
    """

    mode_K: torch.Tensor
    covariance_KK: torch.Tensor
    noise: float
    rows_KK: torch.Tensor
    target_K: torch.Tensor

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw samples ``[D, K]``: solve the problem with noise on its right-hand side."""
        shape = (count, len(self.target_K))
        noise_DK = torch.randn(shape, generator=generator, dtype=torch.float64)
        targets_DK = self.target_K + self.noise**0.5 * noise_DK
        return torch.stack([_nonnegative(self.rows_KK, target_K) for target_K in targets_DK])


def _predict_held_out(
    design_IK: torch.Tensor,
    loss_I: torch.Tensor,
    member_GF: torch.Tensor,
    folds_I: torch.Tensor,
    spread: float,
) -> Predicted:
    """Predict every observation by a fit without its fold."""

    def predict(fitted_I: torch.Tensor, out_I: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = _fit(design_IK[fitted_I], loss_I[fitted_I], member_GF, spread)
        new_OK = design_IK[out_I]
        variance_O = ((new_OK @ posterior.covariance_KK) * new_OK).sum(1) + posterior.noise
        return new_OK @ posterior.mode_K, variance_O

    return held_out(predict, folds_I)


def _fit(
    design_IK: torch.Tensor, loss_I: torch.Tensor, member_GF: torch.Tensor, spread: float
) -> _Posterior:
    """Solve the non-negative ridge for one spread."""
    mean_K, size_K = _kind_means(design_IK, loss_I, member_GF)
    noise = float((loss_I - design_IK @ mean_K).square().mean())
    ridge_K = noise / (spread * size_K).square()
    # The floor keeps the problem regular where the means alone explain every observation.
    ridge_K = ridge_K.clamp_min(1e-9 * len(loss_I))
    rows_RK = torch.cat([design_IK, torch.diag(ridge_K.sqrt())])
    target_R = torch.cat([loss_I, ridge_K.sqrt() * mean_K])
    mode_K = _nonnegative(rows_RK, target_R)
    gram_KK = design_IK.T @ design_IK
    inverse_KK = torch.linalg.inv(gram_KK + torch.diag(ridge_K))
    # Coefficients at their bound use up no degree of freedom.
    used = float((inverse_KK @ gram_KK).diagonal()[mode_K > 0].sum())
    left = float((loss_I - design_IK @ mode_K).square().sum())
    noise = max(left / max(len(loss_I) - used, 1.0), 1e-300)
    basis_RK, rows_KK = torch.linalg.qr(rows_RK)
    return _Posterior(
        mode_K=mode_K,
        covariance_KK=noise * inverse_KK,
        noise=noise,
        rows_KK=rows_KK,
        target_K=basis_RK.T @ target_R,
    )


def _kind_means(
    design_IK: torch.Tensor, loss_I: torch.Tensor, member_GF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean curve of each coefficient's kind and that curve's size, ``[K]`` each."""
    kind_KF = torch.block_diag(member_GF, member_GF)
    design_IF = design_IK @ kind_KF
    mean_F = _nonnegative(design_IF, loss_I)
    typical = float(loss_I.square().mean().sqrt())
    # A kind that no mask has tested costs a typical observation.
    linear_F = torch.arange(len(mean_F)) < len(mean_F) // 2
    mean_F[linear_F & (design_IF == 0).all(0)] = typical
    size_F = mean_F.view(2, -1).sum(0)
    error_F = _standard_error(design_IF, loss_I, mean_F).clamp_max(typical)
    least = _LEAST_SIZE * max(float(size_F.max()), typical, 1e-12)
    size_F = size_F.maximum(error_F).clamp_min(least)
    return kind_KF @ mean_F, (member_GF @ size_F).repeat(2)


def _standard_error(
    design_IF: torch.Tensor, loss_I: torch.Tensor, mean_F: torch.Tensor
) -> torch.Tensor:
    """Return the standard error of each kind's mean loss at t = 1, by least squares."""
    observations, coefficients = design_IF.shape
    squares = (loss_I - design_IF @ mean_F).square().sum()
    noise = squares / max(observations - coefficients, 1)
    covariance_FF = noise * torch.linalg.pinv(design_IF.T @ design_IF, hermitian=True)
    kinds = coefficients // 2
    covariance_2F2F = covariance_FF.view(2, kinds, 2, kinds)
    variance_F: torch.Tensor = covariance_2F2F.diagonal(dim1=1, dim2=3).sum((0, 1))
    return variance_F.clamp_min(0).sqrt()


def _nonnegative(rows_RK: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
    from scipy.optimize import nnls

    solution, _ = nnls(rows_RK.numpy(), target_R.numpy())
    return torch.from_numpy(solution)
