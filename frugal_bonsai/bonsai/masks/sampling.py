"""Adaptive sampling: draw masks in batches until the cut is certain or the budget is spent.

In: an estimator (which draws masks and fits their losses), an evaluation function, a cut. Out: an
:class:`Estimate`: curves, the regression's scores, and why the sampling stopped. After every batch
the posterior of the regression is sampled, and each sample has its own best cut. With L_s the loss
that sample s predicts, cut_s its best cut and cut* the best cut of the posterior mean,

    certainty = sum_s L_s(cut_s) / sum_s L_s(cut*)   in [0, 1].

This is one minus the share of the predicted loss that perfect information would save (the expected
value of perfect information; Raiffa and Schlaifer 1961). Units that are equally good to remove do
not prolong the sampling; undecided units with different losses do.

Differs from the paper, where every round has a fixed number of masks. Holds the masks and losses of
one round.

Shape suffixes: I observations, X columns of a design (units or groups), K coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from frugal_bonsai.bonsai.masks.design import Design
from frugal_bonsai.bonsai.masks.evaluate import Observations
from frugal_bonsai.bonsai.masks.regression import Fit
from frugal_bonsai.bonsai.selection.curves import Curve
from frugal_bonsai.model.units import KeepMask

# Posterior samples whose cuts are compared.
SAMPLES = 32
# Never stop early while held-out R2 is at most this.
_LEAST_R2 = 0.0
SETTLED, BUDGET, FIXED = "settled", "budget spent", "fixed budget"


@dataclass(frozen=True, kw_only=True)
class Seen:
    """All observations of a round.

    Attributes:
        off_IX: Units (or amounts) that each mask switched off.
        loss_I: Loss increase over the same window without a mask, float64.
        clusters_I: Observations of one cluster share a fold, int64.
    """

    off_IX: torch.Tensor
    loss_I: torch.Tensor
    clusters_I: torch.Tensor

    @classmethod
    def of(cls, batches: list[tuple[Design, Observations]]) -> Seen:
        """Join batches; masks of different batches never share a cluster."""
        clusters, first = [], 0
        for _, seen in batches:
            clusters.append(seen.clusters_I + first)
            first = int(clusters[-1].max()) + 1
        return cls(
            off_IX=torch.cat([design.rows(seen.masks_I) for design, seen in batches]),
            loss_I=torch.cat([seen.loss_I for _, seen in batches]),
            clusters_I=torch.cat(clusters),
        )


class Estimator(Protocol):
    """A level's way to draw masks and to read their losses."""

    def draw(self, pairs: int) -> Design:
        """Draw masks and their complements."""

    def fit(self, seen: Seen) -> Fit:
        """Fit the regression to all observations of the round."""

    def curves(self, relevance_K: torch.Tensor) -> tuple[Curve, ...]:
        """Return the cost of removing units by these coefficients, one curve per group."""

    def loss(self, relevance_K: torch.Tensor, cut: KeepMask) -> float:
        """Return the cost of a cut by these coefficients."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The predicted cost of removing units, and its evidence.

    Attributes:
        curves: Predicted cost, one curve per group.
        fit: The regression; None when no masks were evaluated.
        observations: Number of observations fitted, one for each mask evaluated.
        certainty: Certainty of the cut, 0 to 1; None where the regression is a point estimate.
        stopped: Reason why the sampling ended; None when no masks were evaluated.
    """

    curves: tuple[Curve, ...]
    fit: Fit | None = None
    observations: int = 0
    certainty: float | None = None
    stopped: str | None = None

    def describe(self) -> dict[str, Any]:
        """Return the regression's scores and the course of the sampling as plain values."""
        fit = self.fit
        return {
            "observations": self.observations,
            "r2": None if fit is None else _finite(fit.r2),
            "tau": None if fit is None else _finite(fit.tau),
            "coverage": None if fit is None else _finite(fit.coverage),
            "penalty": None if fit is None else fit.penalty,
            "certainty": self.certainty,
            "stopped": self.stopped,
        }

    def evidence(self, score_N: torch.Tensor) -> dict[str, list[list[float]]]:
        """Return what importance and what masks say of the candidates; empty without masks.

        Args:
            score_N: Importance of each unit.

        Returns:
            For each kind of unit, one list for each layer that has candidates: layer, sum of their
            importance, predicted loss of removing them all. Four digits.
        """
        if self.fit is None:
            return {}
        sums: dict[str, dict[int, list[float]]] = {}
        for curve in self.curves:
            if len(curve.order):
                layers = sums.setdefault(curve.group.kind, {})
                found = layers.setdefault(curve.group.layer, [0.0, 0.0])
                found[0] += float(score_N[curve.order].sum())
                found[1] += float(curve.loss[-1])
        return {
            kind: [[layer, *(float(f"{x:.4g}") for x in pair)] for layer, pair in layers.items()]
            for kind, layers in sums.items()
        }


def _finite(value: float | None) -> float | None:
    """Return None for NaN, which JSON does not know."""
    return None if value is None or math.isnan(value) else value


def batch_ends(masks: int, target: float) -> list[int]:
    """Return the number of masks per window evaluated after each batch; the last is ``masks``.

    Each batch is half as large as all before it. The sampling then overshoots by at most a third,
    and the layers are read a few times instead of once per mask.
    """
    if target >= 1:
        return [masks]
    ends = [min(2, masks)]
    while ends[-1] < masks:
        ends.append(min(masks, ends[-1] + 2 * max(1, ends[-1] // 4)))
    return ends


def sample_masks(
    estimator: Estimator,
    evaluate: Callable[[Design, int], Observations],
    cut: Callable[[tuple[Curve, ...]], KeepMask],
    *,
    masks: int,
    windows: int,
    target: float,
    generator: torch.Generator,
) -> Estimate:
    """Evaluate masks until the cut is as certain as the target, or the budget is spent.

    Args:
        estimator: Draws the masks and fits their losses.
        evaluate: Turns a design, and its number of masks per window, into observations.
        cut: Turns curves into the mask that a cut by them keeps.
        masks: Most masks on every window.
        windows: Number of windows with masks of their own; 1 if all windows share the masks.
        target: Certainty at which to stop; 1 spends the budget in one batch.
        generator: Draws the posterior samples.
    """
    batches: list[tuple[Design, Observations]] = []
    done = 0
    for end in batch_ends(masks, target):
        design = estimator.draw((end - done) * windows // 2)
        batches.append((design, evaluate(design, end - done)))
        done = end
        fit = estimator.fit(Seen.of(batches))
        curves = estimator.curves(fit.relevance_K)
        certainty = _certainty(estimator, fit, cut(curves), cut, generator)
        stopped = FIXED if target >= 1 else BUDGET
        if certainty is not None and certainty >= target and fit.r2 > _LEAST_R2 and done < masks:
            stopped = SETTLED
            break
    return Estimate(
        curves=curves,
        fit=fit,
        observations=sum(len(seen.loss_I) for _, seen in batches),
        certainty=certainty,
        stopped=stopped,
    )


def _certainty(
    estimator: Estimator,
    fit: Fit,
    chosen: KeepMask,
    cut: Callable[[tuple[Curve, ...]], KeepMask],
    generator: torch.Generator,
) -> float | None:
    """Return the certainty of the chosen cut; None for a point estimate."""
    if fit.draw is None:
        return None
    own_loss, chosen_loss = 0.0, 0.0
    for relevance_K in fit.draw(SAMPLES, generator):
        own_loss += estimator.loss(relevance_K, cut(estimator.curves(relevance_K)))
        chosen_loss += estimator.loss(relevance_K, chosen)
    certainty = own_loss / chosen_loss if chosen_loss > 0 else 0.0
    return min(1.0, max(0.0, certainty))
