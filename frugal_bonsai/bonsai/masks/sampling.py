"""Adaptive sampling: draw masks in batches until the cut is settled or the budget is spent.

In: a question (what masks may be drawn, what their utilities say), an evaluation function, a cut.
Out: a :class:`Judgement`: curves, the regression's scores, and why the sampling stopped. After
every batch the posterior is sampled; each sample has a cut of its own. With L_s the loss that
sample s predicts, cut_s its own best cut and cut* that of the posterior mean,

    certainty = sum_s L_s(cut_s) / sum_s L_s(cut*)   in [0, 1] :

one minus the share of the cut's predicted loss that perfect information would save (the expected
value of perfect information; Raiffa and Schlaifer 1961). Units between which it does not matter do
not keep the sampling going; units near the threshold whose losses differ do, and the next batch
looks at them. Differs from the paper, whose rounds have a fixed number of masks. Holds the masks
of a round.

Shape suffixes: I observations, X what a mask switches off (units or groups), K coefficients, N
units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from frugal_bonsai.bonsai.masks.design import Design
from frugal_bonsai.bonsai.masks.evaluate import Observations
from frugal_bonsai.bonsai.masks.regression import Fit
from frugal_bonsai.bonsai.selection.cut import Curve
from frugal_bonsai.model.units import KeepMask

# Posterior samples whose cuts are compared.
SAMPLES = 32
# Of these, the share that must agree before something counts as known.
_AGREED = 0.95
# Masks are not trusted to say how sure they are before they foretell those that they have not seen.
_LEAST_R2 = 0.0
SETTLED, BUDGET, FIXED = "settled", "budget spent", "fixed budget"

Focus = TypeVar("Focus")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """All observations of a round.

    Attributes:
        off_IX: what each mask switched off.
        loss_I: float64, loss increase over the same window without a mask.
        clusters_I: int64, observations that share a fold.
        windows_I: int64, the window of each.
    """

    off_IX: torch.Tensor
    loss_I: torch.Tensor
    clusters_I: torch.Tensor
    windows_I: torch.Tensor

    @classmethod
    def of(cls, batches: list[tuple[Design, Observations]]) -> Seen:
        """All batches together; masks of different batches never share a cluster."""
        clusters, first = [], 0
        for _, seen in batches:
            clusters.append(seen.clusters_I + first)
            first = int(clusters[-1].max()) + 1
        return cls(
            off_IX=torch.cat([design.rows(seen.masks_I) for design, seen in batches]),
            loss_I=torch.cat([seen.loss_I for _, seen in batches]),
            clusters_I=torch.cat(clusters),
            windows_I=torch.cat([seen.windows_I for _, seen in batches]),
        )


class Question(Protocol[Focus]):
    """What a method asks masks."""

    def draw(self, pairs: int, focus: Focus | None) -> Design:
        """Masks and their complements; with a focus, about what is undecided."""

    def fit(self, seen: Seen) -> Fit:
        """The regression of all observations so far."""

    def curves(self, relevance_K: torch.Tensor) -> tuple[Curve, ...]:
        """What removing costs, one curve a group, by these coefficients."""

    def loss(self, relevance_K: torch.Tensor, cut: KeepMask) -> float:
        """What a cut costs by these coefficients."""

    def focus(self, cuts: list[KeepMask]) -> Focus:
        """What these cuts, of equal right, disagree about."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """How a round's sampling went.

    Attributes:
        masks: evaluated.
        budget: that might have been.
        certainty: of the cut, 0 to 1; None where the regression is a point estimate.
        stopped: why.
    """

    masks: int
    budget: int
    certainty: float | None
    stopped: str


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a round believes.

    Attributes:
        curves: predicted cost of removing units, one a group.
        fit: the regression; None when no masks were evaluated.
        observations: how many observations it saw.
        sampled: how the sampling went; None when no masks were evaluated.
    """

    curves: tuple[Curve, ...]
    fit: Fit | None
    observations: int
    sampled: Sampled | None = None


def batch_ends(masks: int, target: float) -> list[int]:
    """How many masks (a window) have been evaluated after each batch; the last is ``masks``.

    Each batch is half as large as all before it: the sampling overshoots by a third at most and the
    layers are read a few times, not once a mask.
    """
    if target >= 1:
        return [masks]
    ends = [min(2, masks)]
    while ends[-1] < masks:
        ends.append(min(masks, ends[-1] + 2 * max(1, ends[-1] // 4)))
    return ends


def sample(
    question: Question[Focus],
    evaluate: Callable[[Design, int], Observations],
    cut: Callable[[tuple[Curve, ...]], KeepMask],
    *,
    masks: int,
    windows: int,
    target: float,
    generator: torch.Generator,
) -> Judgement:
    """Ask until the cut is as certain as the target, or the budget is spent.

    Args:
        question: of the method.
        evaluate: a design and its masks on every window to observations.
        cut: curves to what a cut by them keeps.
        masks: on every window, at most.
        windows: that have masks of their own; 1 if masks are shared by all windows.
        target: certainty at which to stop; 1 spends the budget in one batch.
        generator: of the posterior samples.
    """
    batches: list[tuple[Design, Observations]] = []
    focus: Focus | None = None
    done = 0
    for end in batch_ends(masks, target):
        design = question.draw((end - done) * windows // 2, focus)
        batches.append((design, evaluate(design, end - done)))
        done = end
        fit = question.fit(Seen.of(batches))
        curves = question.curves(fit.relevance_K)
        certainty, cuts = _how_certain(question, fit, curves, cut, generator)
        stopped = FIXED if target >= 1 else BUDGET
        if certainty is not None and certainty >= target and fit.r2 > _LEAST_R2 and done < masks:
            stopped = SETTLED
            break
        focus = question.focus(cuts) if cuts else None
    return Judgement(
        curves=curves,
        fit=fit,
        observations=sum(len(seen.loss_I) for _, seen in batches),
        sampled=Sampled(
            masks=done * windows, budget=masks * windows, certainty=certainty, stopped=stopped
        ),
    )


def _how_certain(
    question: Question[Focus],
    fit: Fit,
    curves: tuple[Curve, ...],
    cut: Callable[[tuple[Curve, ...]], KeepMask],
    generator: torch.Generator,
) -> tuple[float | None, list[KeepMask]]:
    """Certainty of the posterior mean's cut, and the cuts of its samples; none without any."""
    if fit.draw is None:
        return None, []
    chosen = cut(curves)
    own_loss, chosen_loss = 0.0, 0.0
    cuts: list[KeepMask] = []
    for relevance_K in fit.draw(SAMPLES, generator):
        cuts.append(cut(question.curves(relevance_K)))
        own_loss += question.loss(relevance_K, cuts[-1])
        chosen_loss += question.loss(relevance_K, chosen)
    certainty = own_loss / chosen_loss if chosen_loss > 0 else 0.0
    return min(1.0, max(0.0, certainty)), cuts


def taken_share(mask: KeepMask, cuts: list[KeepMask]) -> torch.Tensor:
    """Share of the cuts that each unit goes in, float64 ``[N]``."""
    gone_N = torch.zeros(mask.table.units, dtype=torch.float64)
    for one in cuts:
        gone_N += mask.keep_N & ~one.keep_N
    return gone_N / len(cuts)


def undecided(share: torch.Tensor) -> torch.Tensor:
    """Where neither nearly all cuts take it nor nearly none."""
    return (share > 1 - _AGREED) & (share < _AGREED)
