"""``unit`` level: the posterior of one relevance for every candidate unit.

In: which units each mask switches off, one loss increase per observation, the prior. Out: mean and
variance of every unit's relevance, samples of all, and held-out scores. With Z the masks,

    loss = c + Z r + noise,   r ~ N(a rho, s V),   noise of window w ~ N(0, s penalty n_w),

c and a >= 0 are fixed effects with a flat prior (generalised least squares), rho is the prior (the
statistic), V its scale by layer and kind or all ones, n_w the noise of each window, s the overall
scale. V and the penalty are those of the largest evidence, the restricted likelihood (Patterson
and Thompson 1971), s follows in closed form. Held-out folds cannot tell noise from relevances
where units are many more than observations: nothing is foretold either way. The evidence can: a
mask and its complement have opposite shares of the relevances, and not of the noise. All solves
are observations x observations (dual form, as in kriging; Rasmussen and Williams 2006, section
2.7): time and memory are linear in the units, which are visited in blocks, and 100,000 of them
take seconds.

Differs from the paper: there it is an L1- or L2-penalised regression without a prior mean
(paper_regression.py).

Shape suffixes: I observations, T observations fitted on, O those predicted, K units, F fixed
effects, D posterior samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.masks.regression import (
    Fit,
    Predicted,
    coverage,
    fold_of,
    held_out,
    scores,
    window_noise,
)

_PENALTIES = tuple(10.0**e for e in range(-3, 5))
# Units that are expanded to float64 at a time.
_BLOCK = 4096


def fit_units(
    off_IK: torch.Tensor,
    loss_I: torch.Tensor,
    prior_K: torch.Tensor,
    clusters_I: torch.Tensor,
    generator: torch.Generator,
    *,
    strata_K: torch.Tensor | None = None,
    windows_I: torch.Tensor | None = None,
) -> Fit:
    """The posterior; scale by strata or not, and the penalty, by evidence.

    Args:
        off_IK: True where a unit is off.
        loss_I: loss increase of each observation.
        prior_K: the statistic of each unit.
        clusters_I: observations that must share a fold.
        generator: for the folds.
        strata_K: the layer and kind of each unit; None makes no difference between units.
        windows_I: the window of each observation; None: the same noise for all.
    """
    loss_I, prior_K = loss_I.double(), prior_K.double()
    folds_I = fold_of(clusters_I, generator)
    noise_I = torch.ones_like(loss_I)
    if strata_K is None:
        strata_K = torch.zeros(len(prior_K), dtype=torch.int64)
    kernels = _kernels(off_IK, prior_K, strata_K)
    predicted = _held_out(kernels, loss_I, folds_I, noise_I)
    if windows_I is not None:
        noise_I = window_noise(loss_I - predicted.mean_I, windows_I)
        predicted = _held_out(kernels, loss_I, folds_I, noise_I)
    r2, tau = scores(predicted.mean_I, loss_I)
    kernel, posterior = _likeliest(kernels, loss_I, noise_I, torch.ones_like(folds_I).bool())
    mean_K, variance_K = _coefficients(kernel, posterior, off_IK, prior_K)

    def draw(count: int, generator: torch.Generator) -> torch.Tensor:
        return mean_K + _deviations(kernel, posterior, off_IK, prior_K, count, generator)

    return Fit(
        relevance_K=mean_K,
        variance_K=variance_K,
        draw=draw,
        r2=r2,
        tau=tau,
        coverage=coverage(predicted, loss_I),
        penalty=f"ridge {posterior.penalty:g}{kernel.name}",
    )


@dataclass(frozen=True, kw_only=True)
class _Kernel:
    """What the observations say about one another, given a scale of each unit.

    Attributes:
        kernel_II: Z V Z^T with Z centred, mean diagonal 1.
        along_I: Z rho.
        centre_K: what Z was centred by.
        scale_K: V.
        name: for the report.
    """

    kernel_II: torch.Tensor
    along_I: torch.Tensor
    centre_K: torch.Tensor
    scale_K: torch.Tensor
    name: str

    @classmethod
    def of(
        cls,
        kernel_II: torch.Tensor,
        along_I: torch.Tensor,
        centre_K: torch.Tensor,
        scale_K: torch.Tensor,
        name: str,
    ) -> _Kernel:
        """With kernel and scale in units of the kernel's mean diagonal."""
        size = float(kernel_II.diagonal().mean()) or 1.0
        return cls(
            kernel_II=kernel_II / size,
            along_I=along_I,
            centre_K=centre_K,
            scale_K=scale_K / size,
            name=name,
        )


@dataclass(frozen=True, kw_only=True)
class _Posterior:
    """The observations' dual coefficients and what the fixed effects need.

    Attributes:
        inverse_TT: (K + penalty N)^-1.
        effects_TF: ones and, if a > 0, Z rho.
        beta_F: their coefficients.
        spread_FF: (effects^T inverse effects)^-1.
        dual_T: inverse (y - effects beta).
        scale: s.
        penalty: that of the noise.
        noise_T: penalty n.
        evidence: log restricted likelihood, up to a constant.
    """

    inverse_TT: torch.Tensor
    effects_TF: torch.Tensor
    beta_F: torch.Tensor
    spread_FF: torch.Tensor
    dual_T: torch.Tensor
    scale: float
    penalty: float
    noise_T: torch.Tensor
    evidence: float


def _blocks(units: int) -> Iterator[slice]:
    for start in range(0, units, _BLOCK):
        yield slice(start, min(start + _BLOCK, units))


def _kernels(
    off_IK: torch.Tensor, prior_K: torch.Tensor, strata_K: torch.Tensor
) -> tuple[_Kernel, ...]:
    """With the same scale for all units; with the mean statistic of their stratum, where it varies.

    Each stratum's share is summed once and serves both.
    """
    observations, units = off_IK.shape
    scale_K = _strata_scale(prior_K, strata_K)
    flat_II = torch.zeros(observations, observations, dtype=torch.float64)
    scaled_II, along_I = torch.zeros_like(flat_II), torch.zeros_like(flat_II[0])
    centre_K = torch.empty(units, dtype=torch.float64)
    for stratum in sorted(set(strata_K.tolist())):
        mine_U = (strata_K == stratum).nonzero().flatten()
        own_II = torch.zeros_like(flat_II)
        for part in _blocks(len(mine_U)):
            block_U = mine_U[part]
            z_IU = off_IK[:, block_U].double()
            centre_K[block_U] = z_IU.mean(0)
            z_IU -= centre_K[block_U]
            along_I += z_IU @ prior_K[block_U]
            own_II.addmm_(z_IU, z_IU.T)
        flat_II += own_II
        scaled_II.add_(own_II, alpha=float(scale_K[mine_U[0]]))
    flat = _Kernel.of(flat_II, along_I, centre_K, torch.ones_like(scale_K), "")
    if scale_K.min() == scale_K.max():
        return (flat,)
    name = ", scaled by layer and kind"
    return flat, _Kernel.of(scaled_II, along_I, centre_K, scale_K, name)


def _strata_scale(prior_K: torch.Tensor, strata_K: torch.Tensor) -> torch.Tensor:
    """V: the square of the mean statistic of each unit's stratum; ones where there is none."""
    _, index_K, count_S = torch.unique(strata_K, return_inverse=True, return_counts=True)
    sum_S = torch.zeros(len(count_S), dtype=torch.float64).index_add_(0, index_K, prior_K.abs())
    mean_S = sum_S / count_S
    if not mean_S.max() > 0:
        return torch.ones_like(prior_K)
    # A stratum that the statistic finds worthless may still be worth a little.
    scale_K: torch.Tensor = (mean_S / mean_S.max()).clamp_min(1e-2).square()[index_K]
    return scale_K


def _held_out(
    kernels: tuple[_Kernel, ...],
    loss_I: torch.Tensor,
    folds_I: torch.Tensor,
    noise_I: torch.Tensor,
) -> Predicted:
    """Predictions; kernel and penalty are chosen anew without each fold."""

    def predict(fitted_I: torch.Tensor, out_I: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kernel, posterior = _likeliest(kernels, loss_I, noise_I, fitted_I)
        return _foretell(kernel, posterior, noise_I, fitted_I, out_I)

    return held_out(predict, folds_I)


def _likeliest(
    kernels: tuple[_Kernel, ...],
    loss_I: torch.Tensor,
    noise_I: torch.Tensor,
    fitted_I: torch.Tensor,
) -> tuple[_Kernel, _Posterior]:
    """The kernel and penalty of the largest evidence, given these rows."""
    tried = [
        (kernel, _condition(kernel, loss_I, noise_I, penalty, fitted_I))
        for kernel in kernels
        for penalty in _PENALTIES
    ]
    return max(tried, key=lambda one: one[1].evidence)


def _condition(
    kernel: _Kernel,
    loss_I: torch.Tensor,
    noise_I: torch.Tensor,
    penalty: float,
    fitted_I: torch.Tensor,
) -> _Posterior:
    """Given these rows: generalised least squares of the fixed effects, dual of the rest."""
    noise_T = penalty * noise_I[fitted_I]
    covariance_TT = kernel.kernel_II[fitted_I][:, fitted_I]
    covariance_TT.diagonal().add_(noise_T)
    factor_TT = torch.linalg.cholesky(covariance_TT)
    inverse_TT = torch.cholesky_inverse(factor_TT)
    loss_T = loss_I[fitted_I]
    one_T, along_T = torch.ones_like(loss_T), kernel.along_I[fitted_I]
    # A statistic that all masks sum to the same says nothing; one that points the wrong way (a < 0)
    # is left out.
    for effects in ([one_T, along_T], [one_T]):
        effects_TF = torch.stack(effects, dim=1)
        weighed_TF = inverse_TT @ effects_TF
        size_F = effects_TF.square().mean(0).sqrt()
        precision_FF = effects_TF.T @ weighed_TF
        if not (size_F > 1e-9 * size_F.max()).all() or torch.linalg.cond(precision_FF) > 1e12:
            continue
        spread_FF = torch.linalg.inv(precision_FF)
        beta_F = spread_FF @ (weighed_TF.T @ loss_T)
        if len(beta_F) == 1 or beta_F[1] >= 0:
            break
    left_T = loss_T - effects_TF @ beta_F
    dual_T = inverse_TT @ left_T
    spare = max(1, len(loss_T) - len(beta_F))
    scale = max(float(left_T @ dual_T) / spare, 1e-300)
    # The effects' own scale is divided out: with and without the statistic can be compared.
    determinants = 2 * factor_TT.diagonal().log().sum() - torch.logdet(spread_FF)
    determinants -= torch.logdet(effects_TF.T @ effects_TF)
    return _Posterior(
        inverse_TT=inverse_TT,
        effects_TF=effects_TF,
        beta_F=beta_F,
        spread_FF=spread_FF,
        dual_T=dual_T,
        scale=scale,
        penalty=penalty,
        noise_T=noise_T,
        evidence=-0.5 * float(determinants + spare * math.log(scale)),
    )


def _foretell(
    kernel: _Kernel,
    posterior: _Posterior,
    noise_I: torch.Tensor,
    fitted_I: torch.Tensor,
    out_I: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of other observations, their own noise included."""
    between_OT = kernel.kernel_II[out_I][:, fitted_I]
    effects = posterior.effects_TF.shape[1]
    effects_OF = torch.stack([torch.ones_like(kernel.along_I), kernel.along_I], dim=1)
    effects_OF = effects_OF[out_I, :effects]
    mean_O = effects_OF @ posterior.beta_F + between_OT @ posterior.dual_T
    weighed_OT = between_OT @ posterior.inverse_TT
    gap_OF = effects_OF - weighed_OT @ posterior.effects_TF
    variance_O = (
        kernel.kernel_II.diagonal()[out_I]
        - (weighed_OT * between_OT).sum(1)
        + ((gap_OF @ posterior.spread_FF) * gap_OF).sum(1)
        + posterior.penalty * noise_I[out_I]
    )
    return mean_O, posterior.scale * variance_O.clamp_min(1e-12)


def _parts(
    kernel: _Kernel, off_IK: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Blocks of units: where, the centred masks ``[I, K]``, the scale ``[K]``."""
    for part in _blocks(off_IK.shape[1]):
        yield part, off_IK[:, part].double() - kernel.centre_K[part], kernel.scale_K[part]


def _coefficients(
    kernel: _Kernel, posterior: _Posterior, off_IK: torch.Tensor, prior_K: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and variance of every unit's relevance."""
    mean_K, variance_K = torch.empty_like(prior_K), torch.empty_like(prior_K)
    informed = posterior.effects_TF.shape[1] == 2
    share = float(posterior.beta_F[1]) if informed else 0.0
    for part, z_IK, scale_K in _parts(kernel, off_IK):
        weighed_IK = posterior.inverse_TT @ z_IK
        mean_K[part] = share * prior_K[part] + scale_K * (z_IK.T @ posterior.dual_T)
        gap_FK = -scale_K * (posterior.effects_TF.T @ weighed_IK)
        if informed:
            gap_FK[1] += prior_K[part]
        own_K = scale_K - scale_K.square() * (z_IK * weighed_IK).sum(0)
        own_K += (gap_FK * (posterior.spread_FF @ gap_FK)).sum(0)
        variance_K[part] = posterior.scale * own_K.clamp_min(0)
    return mean_K, variance_K


def _deviations(
    kernel: _Kernel,
    posterior: _Posterior,
    off_IK: torch.Tensor,
    prior_K: torch.Tensor,
    count: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Posterior samples minus their mean, ``[D, K]``.

    Matheron's rule: a draw from the prior minus what the regression makes of the observations that
    this draw would give.
    """
    drawn_DK = torch.randn(count, len(prior_K), generator=generator, dtype=torch.float64)
    drawn_DK *= kernel.scale_K.sqrt()
    noise_T = posterior.noise_T
    seen_DT = torch.randn(count, len(noise_T), generator=generator, dtype=torch.float64)
    seen_DT *= noise_T.sqrt()
    for part, z_IK, _ in _parts(kernel, off_IK):
        seen_DT += drawn_DK[:, part] @ z_IK.T
    beta_DF = seen_DT @ posterior.inverse_TT @ posterior.effects_TF @ posterior.spread_FF
    dual_DT = (seen_DT - beta_DF @ posterior.effects_TF.T) @ posterior.inverse_TT
    for part, z_IK, scale_K in _parts(kernel, off_IK):
        drawn_DK[:, part] -= (dual_DT @ z_IK) * scale_K
        if posterior.effects_TF.shape[1] == 2:
            drawn_DK[:, part] -= beta_DF[:, 1:] * prior_K[part]
    deviation_DK: torch.Tensor = drawn_DK * posterior.scale**0.5
    return deviation_DK
