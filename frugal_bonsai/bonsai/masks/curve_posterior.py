"""``group`` level: the posterior of one curve a group, ``loss = a t + b t^2`` with a, b >= 0.

In: how much of each group's pool every mask switches off, one loss increase per observation, what
the statistics expect. Out: the curves' coefficients, their variances, samples of all, held-out
scores.

    loss = X c + noise,   c ~ N(m, s / penalty) within c >= 0,   noise of window w ~ N(0, s n_w).

X holds t and t^2 of every group. m is the mean curve of the group's kind (so that without evidence
every layer loses the same share), or what is expected of each group (by the curves of the round
before, continued behind its cut; by the statistic, added up over the pool) times a factor a kind;
either is fitted, >= 0. What knows more is taken only where it foretells held-out observations
clearly better. Every kind has a penalty of its own, for one KV group costs as much as many
channels; all penalties count, by the density of what they foretell (pseudo-BMA; Yao et al. 2018),
since taking the best for the true one would make the posterior too sure of itself. The mode is
non-negative least squares, the variance the closed form without the bounds; samples are the same
least squares on perturbed observations and means (randomise, then optimise: Bardsley et al. 2014),
so that a bound that binds does so in the samples. All is as large as coefficients x coefficients.

Shape suffixes: I observations, T those fitted on, O those predicted, G groups, K coefficients (all
a, then all b), D posterior samples, P units of a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from frugal_bonsai.bonsai.masks.curve_priors import Belief, Expected, make_beliefs
from frugal_bonsai.bonsai.masks.regression import (
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
# One penalty a kind.
Penalty = tuple[float, ...]
# Samples whose mean is the posterior's within the bounds.
_DRAWS = 64


def fit_curves(
    amount_IG: torch.Tensor,
    loss_I: torch.Tensor,
    clusters_I: torch.Tensor,
    generator: torch.Generator,
    *,
    kinds_G: Sequence[str] | None = None,
    expected: Sequence[Expected] = (),
    windows_I: torch.Tensor | None = None,
) -> Fit:
    """The posterior; its mean, scales and penalty by held-out density.

    Args:
        amount_IG: t, the share of each group's pool that is off.
        loss_I: loss increase of each observation over the same window without a mask.
        clusters_I: observations that must share a fold.
        generator: for the folds.
        kinds_G: the kind of each group: groups of one kind are alike until masks tell them apart;
            None: nothing is known of any.
        expected: what may be known besides; the first has the first word.
        windows_I: the window of each observation; None: the same noise for all.

    Returns:
        ``relevance_K`` holds all a, then all b (``[2G]``): the mean of the posterior within the
        bounds. Its mode would not do: a group that the masks say little about has it at 0, looks as
        if it cost nothing and is cut first.
    """
    design_IK = torch.cat([amount_IG, amount_IG.square()], dim=1).double()
    loss_I = loss_I.double()
    folds_I = fold_of(clusters_I, generator)
    noise_I = torch.ones_like(loss_I)
    beliefs = make_beliefs(design_IK.shape[1], kinds_G, expected)
    tried = _choose(beliefs, design_IK, loss_I, folds_I, noise_I)
    predicted = _mixed(tried)
    if windows_I is not None:
        noise_I = window_noise(loss_I - predicted.mean_I, windows_I)
        tried = _try(tried[0].belief, design_IK, loss_I, folds_I, noise_I)
        predicted = _mixed(tried)
    weight_M = _weights(tried)
    posteriors = [_condition(t.belief, design_IK, loss_I, noise_I, t.penalty) for t in tried]

    def draw(count: int, generator: torch.Generator) -> torch.Tensor:
        return _draw(posteriors, weight_M, count, generator)

    r2, tau = scores(predicted.mean_I, loss_I)
    return Fit(
        relevance_K=draw(_DRAWS, generator).mean(0),
        variance_K=_variance(posteriors, weight_M),
        draw=draw,
        r2=r2,
        tau=tau,
        coverage=coverage(predicted, loss_I),
        penalty=_words(_heaviest(tried)),
    )


def _words(chosen: _Tried) -> str:
    penalties = " and ".join(f"{penalty:g}" for penalty in chosen.penalty)
    return f"non-negative ridge {penalties}{chosen.belief.name}"


@dataclass(frozen=True, kw_only=True)
class _Posterior:
    """Coefficients given observations.

    Attributes:
        mode_K: within the bounds.
        prior_K: m.
        covariance_KK: of the coefficients without the bounds, in units of s.
        scale: s.
        rows_TK: of the whitened least-squares problem, prior included.
        target_T: its right side.
    """

    mode_K: torch.Tensor
    prior_K: torch.Tensor
    covariance_KK: torch.Tensor
    scale: float
    rows_TK: torch.Tensor
    target_T: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class _Tried:
    """How a belief and a penalty foretell held-out observations."""

    belief: Belief
    penalty: Penalty
    predicted: Predicted
    density_I: torch.Tensor


def _try(
    belief: Belief,
    design_IK: torch.Tensor,
    loss_I: torch.Tensor,
    folds_I: torch.Tensor,
    noise_I: torch.Tensor,
) -> list[_Tried]:
    """A belief with every penalty of every kind."""
    tried = []
    for penalty in product(_PENALTIES, repeat=belief.kind_GF.shape[1]):

        def predict(
            fitted_I: torch.Tensor, out_I: torch.Tensor, penalty: Penalty = penalty
        ) -> tuple[torch.Tensor, torch.Tensor]:
            posterior = _condition(
                belief, design_IK[fitted_I], loss_I[fitted_I], noise_I[fitted_I], penalty
            )
            new_OK = design_IK[out_I]
            own_O = ((new_OK @ posterior.covariance_KK) * new_OK).sum(1)
            return new_OK @ posterior.mode_K, posterior.scale * (own_O + noise_I[out_I])

        predicted = held_out(predict, folds_I)
        density_I = log_density(predicted, loss_I)
        tried.append(
            _Tried(belief=belief, penalty=penalty, predicted=predicted, density_I=density_I)
        )
    return tried


def _choose(
    beliefs: list[Belief],
    design_IK: torch.Tensor,
    loss_I: torch.Tensor,
    folds_I: torch.Tensor,
    noise_I: torch.Tensor,
) -> list[_Tried]:
    """The first belief, with every penalty; a later one when it foretells clearly better."""
    best: list[_Tried] = []
    for belief in beliefs:
        tried = _try(belief, design_IK, loss_I, folds_I, noise_I)
        if not best or clearly_likelier(_heaviest(tried).density_I, _heaviest(best).density_I):
            best = tried
    return best


def _heaviest(tried: list[_Tried]) -> _Tried:
    return tried[int(_weights(tried).argmax())]


def _weights(tried: list[_Tried]) -> torch.Tensor:
    """What each penalty counts, by what it foretells; equal where nothing could be held out."""
    total_M = torch.stack([one.density_I.sum() for one in tried])
    if total_M.isnan().any():
        return torch.full_like(total_M, 1 / len(total_M))
    return total_M.softmax(0)


def _mixed(tried: list[_Tried]) -> Predicted:
    """Held-out predictions of all penalties together."""
    weight_M1 = _weights(tried)[:, None]
    mean_MI = torch.stack([one.predicted.mean_I for one in tried])
    square_MI = torch.stack([one.predicted.variance_I for one in tried]) + mean_MI.square()
    mean_I = (weight_M1 * mean_MI).sum(0)
    variance_I = (weight_M1 * square_MI).sum(0) - mean_I.square()
    return Predicted(mean_I=mean_I, variance_I=variance_I)


def _condition(
    belief: Belief,
    design_TK: torch.Tensor,
    loss_T: torch.Tensor,
    noise_T: torch.Tensor,
    penalty: Penalty,
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
    penalty_G = belief.kind_GF @ torch.tensor(penalty, dtype=torch.float64)
    precision_K = penalty_G.repeat(2) * observations * mean_square
    root_K = precision_K.sqrt()
    rows = torch.cat([white_TK, torch.diag(root_K)])
    target = torch.cat([white_T, root_K * prior_K])
    mode_K = _nonnegative(rows, target)
    covariance_KK = torch.linalg.inv(white_TK.T @ white_TK + torch.diag(precision_K))
    # Coefficients at their bound take no observation's freedom.
    free_K = mode_K > 0
    used = float((covariance_KK @ (white_TK.T @ white_TK)).diagonal()[free_K].sum())
    left = float((white_T - white_TK @ mode_K).square().sum())
    return _Posterior(
        mode_K=mode_K,
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


def _variance(posteriors: list[_Posterior], weight_M: torch.Tensor) -> torch.Tensor:
    """Of every coefficient, without the bounds: within the penalties and between them."""
    mean_MK = torch.stack([one.mode_K for one in posteriors])
    own_MK = torch.stack([one.scale * one.covariance_KK.diagonal() for one in posteriors])
    mean_K = weight_M @ mean_MK
    variance_K: torch.Tensor = weight_M @ (own_MK + mean_MK.square()) - mean_K.square()
    return variance_K


def _draw(
    posteriors: list[_Posterior], weight_M: torch.Tensor, count: int, generator: torch.Generator
) -> torch.Tensor:
    """Samples ``[D, K]``: every row of the whitened problem has noise of variance ``scale``."""
    which_D = torch.multinomial(weight_M, count, replacement=True, generator=generator)
    noise_DK = torch.randn(
        count, len(posteriors[0].mode_K), generator=generator, dtype=torch.float64
    )
    # The triangular factor has the same least squares and as few rows as coefficients.
    reduced = {at: _reduce(posteriors[at]) for at in set(which_D.tolist())}
    samples = []
    for at, noise_K in zip(which_D.tolist(), noise_DK, strict=True):
        rows_KK, pulled_K = reduced[at]
        samples.append(_nonnegative(rows_KK, pulled_K + posteriors[at].scale ** 0.5 * noise_K))
    return torch.stack(samples)


def _reduce(posterior: _Posterior) -> tuple[torch.Tensor, torch.Tensor]:
    basis_TK, rows_KK = torch.linalg.qr(posterior.rows_TK)
    return rows_KK, basis_TK.T @ posterior.target_T
