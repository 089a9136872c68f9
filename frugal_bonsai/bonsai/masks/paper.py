"""The paper's regression: a linear model by gradient descent, chosen by Kendall's tau.

In: masks and their losses. Out: a coefficient per candidate and held-out scores, without a
posterior. As in the published code: Adam on the squared error plus an L1 or L2 penalty, weights
that start at one, inputs divided by the root of the number of units, and for the best epoch and the
best of a grid (penalty x learning rate x batch) Kendall's tau over five folds; then a fit on all
observations. The gradient is that of this small regression. The language model is never
differentiated. Float32 on the CPU; memory is linear in masks x candidates.

Differs from the published code: both penalties are in the grid (there one is an option).

Shape suffixes: I observations, K candidates.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.masks.regression import Fit, held_out, scores

PENALTIES = (100.0, 1e-4, 0.0)
RATE_FACTORS = (100.0, 10.0, 1.0, 0.1)
BATCHES = (32, 64, 128)
EPOCHS, PATIENCE, FOLDS = 50, 10, 5


@dataclass(frozen=True)
class _Setting:
    """One point of the grid."""

    kind: str
    penalty: float
    rate_factor: float
    batch: int


def fit_paper(off_IK: torch.Tensor, loss_I: torch.Tensor, generator: torch.Generator) -> Fit:
    """Fit the loss increases of masks.

    Args:
        off_IK: 1 where a unit is off, else 0.
        loss_I: Loss increase of each mask.
        generator: Draws folds and batches.
    """
    # The paper regresses utility on kept units; relevance is the coefficient of "kept".
    keep_IK = 1.0 - off_IK.float()
    utility_I = -loss_I.float()
    scale = math.sqrt(keep_IK.shape[1] + 1.0)
    keep_IK = keep_IK / scale
    folds_I = torch.randperm(len(loss_I), generator=generator) % min(FOLDS, len(loss_I))
    best_tau, chosen = -math.inf, None
    for setting in _grid():
        taus = []
        for fold in range(int(folds_I.max()) + 1):
            out_I = folds_I == fold
            train = (keep_IK[~out_I], utility_I[~out_I])
            _, tau = _descend(train, (keep_IK[out_I], utility_I[out_I]), setting, scale, generator)
            taus.append(tau)
        mean = sum(taus) / len(taus)
        if mean > best_tau:
            best_tau, chosen = mean, setting
    assert chosen is not None
    everything = (keep_IK, utility_I)
    weight_K, _ = _descend(everything, everything, chosen, scale, generator)

    def predict(fitted_I: torch.Tensor, out_I: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = keep_IK[fitted_I], utility_I[fitted_I]
        fitted_K, _ = _descend((x, y), (x, y), chosen, scale, generator)
        mean_I = y.mean() + (keep_IK[out_I] - x.mean(0)) @ fitted_K
        return mean_I.double(), torch.full_like(mean_I, torch.nan).double()

    r2, _ = scores(held_out(predict, folds_I).mean_I, utility_I.double())
    return Fit(
        relevance_K=weight_K.double() / scale,
        r2=r2,
        tau=best_tau,
        penalty=f"{chosen.kind} {chosen.penalty:g}, rate factor {chosen.rate_factor:g}, "
        f"batch {chosen.batch}",
    )


def _grid() -> list[_Setting]:
    """Return the grid; without a penalty L1 and L2 are the same."""
    every = itertools.product(("l1", "l2"), PENALTIES, RATE_FACTORS, BATCHES)
    return [_Setting(*point) for point in every if point[:2] != ("l2", 0)]


def _descend(
    train: tuple[torch.Tensor, torch.Tensor],
    test: tuple[torch.Tensor, torch.Tensor],
    setting: _Setting,
    scale: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, float]:
    """Minimise the penalised error; return weights and tau of the best epoch on ``test``."""
    from scipy.stats import kendalltau

    x_IK, y_I = train[0], train[1] - train[1].mean()
    weight_K = torch.ones(x_IK.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    rate = 1.0 / (len(weight_K) * setting.rate_factor)
    optimiser = torch.optim.Adam([weight_K, bias], lr=rate)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, mode="max", factor=0.5, patience=3, min_lr=1e-5
    )
    best_tau, best_K, since = -math.inf, weight_K.detach().clone(), 0
    for _ in range(EPOCHS):
        for rows in torch.split(torch.randperm(len(y_I), generator=generator), setting.batch):
            error = (x_IK[rows] @ weight_K + bias - y_I[rows]).square().mean()
            size = weight_K.abs() if setting.kind == "l1" else (weight_K - 1).square()
            loss = error + setting.penalty / scale * size.sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            predicted = test[0] @ weight_K
        tau = float(kendalltau(predicted.numpy(), test[1].numpy()).statistic)
        tau = -1.0 if math.isnan(tau) else tau
        scheduler.step(tau)
        since += 1
        if tau >= best_tau:
            best_tau, best_K, since = tau, weight_K.detach().clone(), 0
        if since > PATIENCE:
            break
    return best_K, best_tau
