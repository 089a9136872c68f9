"""Importance: one score per unit from one unmasked sweep; the paper's informative prior.

In: the inputs x of every output projection over the calibration windows, and its weight w. Out: a
score per unit; a higher score means a more important unit. ``exact`` is the default.

Memory: the moments of one layer's inputs (for ``exact`` one Gram matrix a group).

| score | per column; summed (wanda, activation, flap: averaged) over a unit's columns | source |
|---|---|---|
| activation | sqrt(E[x^2]) | Bonsai, section 3.2 |
| wanda | mean_h abs(w) * sqrt(E[x^2]) | Sun et al. 2023, as Bonsai uses it |
| output | E[x^2] * norm(w)^2 | |
| fluctuation | Var[x] * norm(w)^2 | FLAP, An et al. 2023 |
| flap | ``fluctuation`` as a z-score among the group's columns | FLAP, An et al. 2023 |
| exact | loss that remains after optimal compensation, see gram.py | Hassibi and Stork 1993 |
| magnitude | norm(w) | |
| random | uniform | |

Shape suffixes: N all units, U units of a group, C columns, H hidden, B windows of a micro-batch, S
tokens of a window, T tokens, R tokens routed to an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from frugal_bonsai.accelerator import sum_dtype
from frugal_bonsai.bonsai.importance.gram import Moments, column_norms, exact_loss_U
from frugal_bonsai.bonsai.importance.imputation import ImputationWriter
from frugal_bonsai.model.units import KeepMask, UnitGroup
from frugal_bonsai.stream.layers import Parameters
from frugal_bonsai.stream.stored_weight import dense_weight


@dataclass
class ImportanceScores:
    """Scores of all units.

    Attributes:
        name: one of :data:`SCORES`, ``similarity`` or ``reap``.
        score_N: float64 ``[N]`` over the dense model's units; 0 for removed units.
        means: full name of an output projection's weight -> mean input of its remaining columns,
            fp32 ``[C]`` on the CPU; None where the means were not requested.
    """

    name: str
    score_N: torch.Tensor
    means: dict[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class _GroupStatistics:
    """Everything that the score of one group may be computed from."""

    group: UnitGroup
    moments: Moments
    weight_HC: torch.Tensor
    damping: float
    generator: torch.Generator

    @property
    def units(self) -> int:
        return self.weight_HC.shape[1] // self.group.columns_per_unit

    def norms_C(self, order: int = 2) -> torch.Tensor:
        return column_norms(self.weight_HC, sum_dtype(self.weight_HC.device), order=order)

    def sums_U(self, score_C: torch.Tensor) -> torch.Tensor:
        return score_C.view(self.units, -1).sum(1)

    def means_U(self, score_C: torch.Tensor) -> torch.Tensor:
        return score_C.view(self.units, -1).mean(1)


def _activation(s: _GroupStatistics) -> torch.Tensor:
    return s.means_U(s.moments.mean_square_C.sqrt())


def _wanda(s: _GroupStatistics) -> torch.Tensor:
    mean_weight_C = s.norms_C(order=1) / len(s.weight_HC)
    return s.means_U(mean_weight_C * s.moments.mean_square_C.sqrt())


def _output(s: _GroupStatistics) -> torch.Tensor:
    return s.sums_U(s.moments.mean_square_C * s.norms_C().square())


def _fluctuation(s: _GroupStatistics) -> torch.Tensor:
    return s.sums_U(s.moments.variance_C * s.norms_C().square())


def _flap(s: _GroupStatistics) -> torch.Tensor:
    score_C = s.moments.variance_C * s.norms_C().square()
    return s.means_U((score_C - score_C.mean()) / score_C.std().clamp_min(1e-30))


def _exact(s: _GroupStatistics) -> torch.Tensor:
    if s.moments.empty:
        return torch.zeros(s.units)
    factor = s.moments.factor(s.damping, where=s.group.name)
    loss_U = exact_loss_U(factor, s.weight_HC, s.group.columns_per_unit)
    return loss_U / s.moments.tokens  # the moments are sums over tokens, the loss is a mean


def _magnitude(s: _GroupStatistics) -> torch.Tensor:
    return s.sums_U(s.norms_C().square()).sqrt()


def _random(s: _GroupStatistics) -> torch.Tensor:
    return torch.rand(s.units, generator=s.generator, dtype=torch.float64)


SCORES: dict[str, Callable[[_GroupStatistics], torch.Tensor]] = {
    "activation": _activation,
    "wanda": _wanda,
    "output": _output,
    "fluctuation": _fluctuation,
    "flap": _flap,
    "exact": _exact,
    "magnitude": _magnitude,
    "random": _random,
}


class ImportanceBuilder:
    """Computes :class:`ImportanceScores` group by group; a ``taps.Tap`` of an unmasked sweep.

    Args:
        name: one of :data:`SCORES`.
        mask: the remaining units; moments and weights cover only their columns.
        damping: for ``exact``.
        generator: for ``random``.
        imputations: writes the next round's imputations from the same moments; None writes none.
        keep_means: return the mean inputs too.
    """

    def __init__(
        self,
        name: str,
        mask: KeepMask,
        *,
        damping: float,
        generator: torch.Generator,
        imputations: ImputationWriter | None = None,
        keep_means: bool = False,
    ) -> None:
        self.name, self._mask = name, mask
        self._damping, self._generator, self._imputations = damping, generator, imputations
        self._score_N = torch.zeros(mask.table.units, dtype=torch.float64)
        self._means: dict[str, torch.Tensor] | None = {} if keep_means else None
        self._moments: dict[UnitGroup, Moments] = {}

    @property
    def needs_gram(self) -> bool:
        """True where the scores or the imputations need Gram matrices."""
        return self.name == "exact" or self._imputations is not None

    def inputs(self, group: UnitGroup, input_BSC: torch.Tensor) -> None:
        """Add a micro-batch's inputs of one output projection."""
        if group not in self._moments:
            self._moments[group] = Moments(
                input_BSC.shape[-1], device=input_BSC.device, gram=self.needs_gram
            )
        if group.expert is None:
            self._moments[group].add(input_BSC)
            return
        # Only the tokens routed to an expert have inputs other than zero.
        input_TC = input_BSC.flatten(0, 1)
        routed_RC = input_TC[input_TC.any(dim=1)]
        self._moments[group].add(routed_RC[None], tokens=len(input_TC))

    def end_layer(self, layer: int, parameters: Parameters) -> None:
        """Score the layer's groups and free their moments."""
        for group in list(self._moments):
            moments = self._moments.pop(group)
            self.add(group, moments, dense_weight(parameters[f"{group.output}.weight"]))

    def add(self, group: UnitGroup, moments: Moments, weight_HC: torch.Tensor) -> None:
        """Score one group.

        Args:
            group: the group.
            moments: of the projection's inputs; ``exact`` and imputations destroy the Gram matrix.
            weight_HC: the projection's remaining columns.
        """
        score_U = SCORES[self.name](
            _GroupStatistics(group, moments, weight_HC, self._damping, self._generator)
        )
        if self._imputations is not None and not moments.empty:
            self._imputations.add(group, moments, score_U)
        if self._means is not None:
            self._means[group.output_weight] = moments.mean_C.float().cpu()
        # The slice is a view: the boolean index writes into the flat vector.
        self._score_N[self._mask.table.span(group)][self._mask.of(group)] = score_U.cpu().double()

    def of_layer(self, layer: int) -> list[float]:
        """Return the scores of a layer's units, the removed ones included."""
        groups = self._mask.table.of_layer(layer)
        return [x for group in groups for x in self._score_N[self._mask.table.span(group)].tolist()]

    def restore(self, layer: int, scores: Sequence[float]) -> None:
        """Set the scores of a layer's units to those of :meth:`of_layer`.

        ``random`` draws as often as if it scored them, so that later layers get the same scores.
        """
        start = 0
        for group in self._mask.table.of_layer(layer):
            if self.name == "random" and self._mask.kept(group):
                torch.rand(self._mask.kept(group), generator=self._generator, dtype=torch.float64)
            own = torch.tensor(scores[start : start + group.count], dtype=torch.float64)
            self._score_N[self._mask.table.span(group)] = own
            start += group.count

    def build(self) -> ImportanceScores:
        """Return the scores of all groups added so far."""
        return ImportanceScores(self.name, self._score_N, self._means)
