"""``group`` level: the posterior of one curve a group, ``loss = a t + b t^2`` with a, b >= 0.

In: how much of each group's pool every mask switches off, one loss increase per observation, what the
statistics expect. Out: the curves' coefficients, their variances, samples of all, held-out scores.

    loss = X c + noise,   c ~ N(m, s V) within c >= 0,   noise of window w ~ N(0, s penalty n_w).

X holds t and t^2 of every group. m is what the statistic (the sum of the pool's prior, lowest first)
makes of each group, times a factor >= 0 a kind that is fitted, or zero; V is flat, or grows with that
expectation, so that a group of large losses may deviate by more. Both, and the penalty, are chosen by
held-out density. The mean is non-negative least squares; the variance is the closed form without the
bounds; samples are the same least squares on perturbed observations and means (randomise, then
optimise: Bardsley et al. 2014), so that a bound that binds does so in the samples. All of it is as
large as coefficients x coefficients.

Shape suffixes: I observations, T those fitted on, O those predicted, G groups, K coefficients (all a,
then all b), D posterior samples, P units of a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.regress import (
    Fit,
    Predicted,
    clearly_likelier,
    coverage,
    fold_of,
    held_out,
    log_density,
    scores,
    window_noise,
)

_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the statistics expect of every group.

    Attributes:
        curve_K: coefficients of the groups' curves, in the statistic's own measure.
        kinds_G: the kind of each group; one factor is fitted for each.
    """

    curve_K: torch.Tensor
    kinds_G: Sequence[str]


def expected_curve(score_P: torch.Tensor) -> tuple[float, float]:
    """a and b of the curve nearest to the cumulated statistic of a pool, lowest first."""
    from scipy.optimize import nnls

    if not len(score_P):
        return 0.0, 0.0
    amount_P = torch.linspace(0, 1, len(score_P) + 1, dtype=torch.float64)[1:]
    basis = torch.stack([amount_P, amount_P.square()], dim=1)
    (a, b), _ = nnls(basis.numpy(), score_P.double().cumsum(0).numpy())
    return float(a), float(b)


def fit_curves(
    amount_IG: torch.Tensor,
    loss_I: torch.Tensor,
    clusters_I: torch.Tensor,
    generator: torch.Generator,
    *,
    expected: Expected | None = None,
    windows_I: torch.Tensor | None = None,
) -> Fit:
    """The posterior; its mean, scales and penalty by held-out density.

    Args:
        amount_IG: t, the share of each group's pool that is off.
        loss_I: loss increase of each observation over the same window without a mask.
        clusters_I: observations that must share a fold.
        generator: for the folds.
        expected: by the statistics; None: nothing is known before.
        windows_I: the window of each observation; None: the same noise for all.

    Returns:
        ``relevance_K`` holds all a, then all b (``[2G]``).
    """
    design_IK = torch.cat([amount_IG, amount_IG.square()], dim=1).double()
    loss_I = loss_I.double()
    folds_I = fold_of(clusters_I, generator)
    even_I = torch.ones_like(loss_I)
    beliefs = _beliefs(design_IK, expected)
    belief, penalty, predicted = _choose(beliefs, design_IK, loss_I, folds_I, even_I)
    noise_I = even_I
    if windows_I is not None:
        noise_I = window_noise(loss_I - predicted.mean_I, windows_I)
        belief, penalty, predicted = _choose(beliefs, design_IK, loss_I, folds_I, noise_I)
    r2, tau = scores(predicted.mean_I, loss_I)
    posterior = _condition(belief, design_IK, loss_I, noise_I, penalty)

    def draw(count: int, generator: torch.Generator) -> torch.Tensor:
        return _draw(posterior, belief, count, generator)

    return Fit(
        relevance_K=posterior.mean_K,
        variance_K=posterior.scale * posterior.covariance_KK.diagonal(),
        draw=draw,
        r2=r2,
        tau=tau,
        coverage=coverage(predicted, loss_I),
        penalty=f"non-negative ridge {penalty:g}{belief.name}",
    )


@dataclass(frozen=True, kw_only=True)
class _Belief:
    """What is believed of the coefficients before any mask.

    Attributes:
        shape_KF: the mean is this times factors >= 0 that are fitted; ``[K, 0]`` for zero.
        scale_K: V.
        name: for the report.
    """

    shape_KF: torch.Tensor
    scale_K: torch.Tensor
    name: str


@dataclass(frozen=True, kw_only=True)
class _Posterior:
    """Coefficients given observations.

    Attributes:
        mean_K: within the bounds.
        prior_K: m.
        covariance_KK: of the coefficients without the bounds, in units of s.
        scale: s.
        rows_TK: of the whitened least-squares problem, prior included.
        target_T: its right side.
    """

    mean_K: torch.Tensor
    prior_K: torch.Tensor
    covariance_KK: torch.Tensor
    scale: float
    rows_TK: torch.Tensor
    target_T: torch.Tensor


def _beliefs(design_IK: torch.Tensor, expected: Expected | None) -> list[_Belief]:
    """Nothing known; and what the statistics expect, with even and with growing scales."""
    coefficients = design_IK.shape[1]
    even_K = torch.ones(coefficients, dtype=torch.float64)
    nothing = torch.zeros(coefficients, 0, dtype=torch.float64)
    beliefs = [_Belief(shape_KF=nothing, scale_K=even_K, name="")]
    if expected is None:
        return beliefs
    groups = coefficients // 2
    total_G = expected.curve_K[:groups] + expected.curve_K[groups:]
    shapes, scale_G = [], torch.ones(groups, dtype=torch.float64)
    for kind in sorted(set(expected.kinds_G)):
        mine_G = torch.tensor([other == kind for other in expected.kinds_G])
        if not float(total_G[mine_G].sum()) > 0:
            continue
        shapes.append(torch.where(mine_G.repeat(2), expected.curve_K, 0.0))
        mean = float(total_G[mine_G].mean())
        scale_G[mine_G] = (total_G[mine_G] / mean).clamp_min(0.1).square()
    if not shapes:
        return beliefs
    shape_KF, scale_K = torch.stack(shapes, dim=1), scale_G.repeat(2)
    scale_K = scale_K / scale_K.mean()
    name = " around the statistics"
    return [
        *beliefs,
        _Belief(shape_KF=shape_KF, scale_K=even_K, name=name),
        _Belief(shape_KF=shape_KF, scale_K=scale_K, name=f"{name}, scaled by layer and kind"),
    ]


def _choose(
    beliefs: list[_Belief],
    design_IK: torch.Tensor,
    loss_I: torch.Tensor,
    folds_I: torch.Tensor,
    noise_I: torch.Tensor,
) -> tuple[_Belief, float, Predicted]:
    """The penalty, and the first belief, under which held-out observations are likeliest.

    A later one only when it is clearly better.
    """
    best: tuple[torch.Tensor, _Belief, float, Predicted] | None = None
    for belief in beliefs:
        mine: tuple[torch.Tensor, _Belief, float, Predicted] | None = None
        for penalty in _PENALTIES:

            def predict(
                fitted_I: torch.Tensor,
                out_I: torch.Tensor,
                belief: _Belief = belief,
                penalty: float = penalty,
            ) -> tuple[torch.Tensor, torch.Tensor]:
                posterior = _condition(
                    belief, design_IK[fitted_I], loss_I[fitted_I], noise_I[fitted_I], penalty
                )
                new_OK = design_IK[out_I]
                own_O = ((new_OK @ posterior.covariance_KK) * new_OK).sum(1)
                return new_OK @ posterior.mean_K, posterior.scale * (own_O + noise_I[out_I])

            predicted = held_out(predict, folds_I)
            density = log_density(predicted, loss_I)
            if mine is None or density.mean() > mine[0].mean():
                mine = (density, belief, penalty, predicted)
        assert mine is not None
        if best is None or clearly_likelier(mine[0], best[0]):
            best = mine
    assert best is not None
    return best[1:]


def _condition(
    belief: _Belief,
    design_TK: torch.Tensor,
    loss_T: torch.Tensor,
    noise_T: torch.Tensor,
    penalty: float,
) -> _Posterior:
    """Given these observations: in units in which their mean noise has variance ``scale``."""
    observations, coefficients = design_TK.shape
    weight_T = noise_T.rsqrt()
    white_TK, white_T = design_TK * weight_T[:, None], loss_T * weight_T
    prior_K = torch.zeros(coefficients, dtype=torch.float64)
    if belief.shape_KF.shape[1]:
        prior_K = belief.shape_KF @ _nonnegative(white_TK @ belief.shape_KF, white_T)
    # As a share of what the observations say about a coefficient on average.
    mean_square = design_TK.square().mean().clamp_min(1e-12)
    precision_K = penalty * observations * mean_square / belief.scale_K
    root_K = precision_K.sqrt()
    rows = torch.cat([white_TK, torch.diag(root_K)])
    target = torch.cat([white_T, root_K * prior_K])
    mean_K = _nonnegative(rows, target)
    covariance_KK = torch.linalg.inv(white_TK.T @ white_TK + torch.diag(precision_K))
    # Coefficients at their bound take no observation's freedom.
    free_K = mean_K > 0
    used = float((covariance_KK @ (white_TK.T @ white_TK)).diagonal()[free_K].sum())
    left = float((white_T - white_TK @ mean_K).square().sum())
    return _Posterior(
        mean_K=mean_K,
        prior_K=prior_K,
        covariance_KK=covariance_KK,
        scale=max(left / max(observations - used, 1.0), 1e-300),
        rows_TK=rows,
        target_T=target,
    )


def _nonnegative(rows_TK: torch.Tensor, target_T: torch.Tensor) -> torch.Tensor:
    from scipy.optimize import nnls

    solution, _ = nnls(rows_TK.numpy(), target_T.numpy())
    return torch.from_numpy(solution)


def _draw(
    posterior: _Posterior, belief: _Belief, count: int, generator: torch.Generator
) -> torch.Tensor:
    """Samples ``[D, K]``: every row of the whitened problem has noise of variance ``scale``."""
    # The triangular factor has the same least squares and as few rows as coefficients.
    rows_KK, pulled_K = _reduce(posterior)
    noise_DK = torch.randn(count, len(pulled_K), generator=generator, dtype=torch.float64)
    targets_DK = pulled_K + posterior.scale**0.5 * noise_DK
    return torch.stack([_nonnegative(rows_KK, target_K) for target_K in targets_DK])


def _reduce(posterior: _Posterior) -> tuple[torch.Tensor, torch.Tensor]:
    basis_TK, rows_KK = torch.linalg.qr(posterior.rows_TK)
    return rows_KK, basis_TK.T @ posterior.target_T
