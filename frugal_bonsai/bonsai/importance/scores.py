"""The prior: a cheap score per unit from one unmasked sweep.

In: the inputs x of every output projection over the calibration windows, and its weight w. Out: a
score per unit, higher = more relevant. ``exact`` is the default. Holds the moments
of one layer's inputs (one Gram matrix a group for ``exact``).

| prior | per column, summed (wanda, activation: averaged) over a unit's columns | source |
|---|---|---|
| activation | sqrt(E[x^2]) | Bonsai, section 3.2 |
| wanda | mean_h abs(w) * sqrt(E[x^2]) | Sun et al. 2023, as Bonsai uses it |
| output | E[x^2] * norm(w)^2 | |
| fluctuation | Var[x] * norm(w)^2 | FLAP, An et al. 2023 |
| flap | the same as a z-score among the group's columns, averaged | FLAP, An et al. 2023 |
| exact | the exact layerwise loss, see gram.py | Hassibi and Stork 1993 |
| magnitude | norm(w) | |
| random | uniform | |

Shape suffixes: N all units, U units of a group, C columns, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from frugal_bonsai.accelerator import sum_dtype
from frugal_bonsai.bonsai.importance.gram import Moments, column_norms, exact_loss_U
from frugal_bonsai.bonsai.importance.imputation import StandInWriter
from frugal_bonsai.model.units import KeepMask, UnitGroup
from frugal_bonsai.stream.layers import Parameters
from frugal_bonsai.stream.stored_weight import dense_weight


@dataclass(frozen=True)
class _Scored:
    """What a prior may look at, for one group."""

    moments: Moments
    weight_HC: torch.Tensor
    group: UnitGroup
    damping: float
    generator: torch.Generator

    def per_unit(self, score_C: torch.Tensor) -> torch.Tensor:
        """``[U, columns_per_unit]`` from ``[C]``."""
        return score_C.view(-1, self.group.columns_per_unit)

    @property
    def weight_square_C(self) -> torch.Tensor:
        return column_norms(self.weight_HC, sum_dtype(self.weight_HC.device)).square()


def _activation(s: _Scored) -> torch.Tensor:
    return s.per_unit(s.moments.mean_square_C.sqrt()).mean(1)


def _wanda(s: _Scored) -> torch.Tensor:
    sum_C = column_norms(s.weight_HC, sum_dtype(s.weight_HC.device), order=1)
    weight_C = sum_C / len(s.weight_HC)
    return s.per_unit(weight_C * s.moments.mean_square_C.sqrt()).mean(1)


def _output(s: _Scored) -> torch.Tensor:
    return s.per_unit(s.moments.mean_square_C * s.weight_square_C).sum(1)


def _fluctuation(s: _Scored) -> torch.Tensor:
    return s.per_unit(s.moments.variance_C * s.weight_square_C).sum(1)


def _flap(s: _Scored) -> torch.Tensor:
    score_C = s.moments.variance_C * s.weight_square_C
    return s.per_unit((score_C - score_C.mean()) / score_C.std().clamp_min(1e-30)).mean(1)


def _magnitude(s: _Scored) -> torch.Tensor:
    return s.per_unit(s.weight_square_C).sum(1).sqrt()


def _random(s: _Scored) -> torch.Tensor:
    units = s.weight_HC.shape[1] // s.group.columns_per_unit
    return torch.rand(units, generator=s.generator, dtype=torch.float64)


def _exact(s: _Scored) -> torch.Tensor:
    if s.moments.empty:
        return torch.zeros(s.weight_HC.shape[1] // s.group.columns_per_unit)
    factor = s.moments.factor(s.damping, where=s.group.name)
    loss_U = exact_loss_U(factor, s.weight_HC, s.group.columns_per_unit)
    return loss_U / s.moments.tokens  # the moments are sums over tokens, the loss is a mean


PRIORS: dict[str, Callable[[_Scored], torch.Tensor]] = {
    "activation": _activation,
    "wanda": _wanda,
    "output": _output,
    "fluctuation": _fluctuation,
    "flap": _flap,
    "exact": _exact,
    "magnitude": _magnitude,
    "random": _random,
}


@dataclass
class Prior:
    """Scores of all units.

    Attributes:
        name: one of :data:`PRIORS`.
        score_N: float64 ``[N]`` over the dense model's units; 0 for removed ones.
        means: where asked for, the mean input of every output projection's columns, by the name of
            its weight, over the columns that are alive, fp32.
    """

    name: str
    score_N: torch.Tensor
    means: dict[str, torch.Tensor] | None = None


class PriorBuilder:
    """Turns moments into a :class:`Prior`, group by group.

    Args:
        name: one of :data:`PRIORS`.
        mask: the units that are still alive; moments and weights are over those alone.
        damping: for ``exact``.
        generator: for ``random``.
        stand_ins: given, the next round's are made from the same moments.
        keep_means: keep the mean inputs too.
    """

    def __init__(
        self,
        name: str,
        mask: KeepMask,
        *,
        damping: float,
        generator: torch.Generator,
        stand_ins: StandInWriter | None = None,
        keep_means: bool = False,
    ) -> None:
        self.name, self._mask = name, mask
        self._damping, self._generator, self._stand_ins = damping, generator, stand_ins
        self._score_N = torch.zeros(mask.table.units, dtype=torch.float64)
        self._means: dict[str, torch.Tensor] | None = {} if keep_means else None

    @property
    def needs_gram(self) -> bool:
        """Whether the Gram matrix must be collected."""
        return self.name == "exact" or self._stand_ins is not None

    def add(self, group: UnitGroup, moments: Moments, weight_HC: torch.Tensor) -> None:
        """Score one group from its moments and its projection's weight (kept columns).

        ``exact`` and the stand-ins use the Gram matrix up.
        """
        scored = _Scored(moments, weight_HC, group, self._damping, self._generator)
        score_U = PRIORS[self.name](scored)
        if self._stand_ins is not None and not moments.empty:
            self._stand_ins.add(group, moments, score_U)
        if self._means is not None:
            self._means[group.output_weight] = moments.mean_C.float().cpu()
        alive_U = self._mask.of(group)
        self._score_N[self._mask.table.span(group)][alive_U] = score_U.cpu().double()
        # (a boolean index of a view writes through to the flat vector)

    def build(self) -> Prior:
        """The finished prior."""
        return Prior(self.name, self._score_N, self._means)


class PriorTap:
    """Collects a prior during an unmasked sweep; a ``forward.Tap``."""

    def __init__(self, builder: PriorBuilder, device: torch.device) -> None:
        self._builder, self._device = builder, device
        self._moments: dict[UnitGroup, Moments] = {}

    def inputs(self, group: UnitGroup, input_BSC: torch.Tensor) -> None:
        """Add a micro-batch's inputs of one output projection."""
        if group not in self._moments:
            self._moments[group] = Moments(
                input_BSC.shape[-1], device=self._device, gram=self._builder.needs_gram
            )
        if group.expert is None:
            self._moments[group].add(input_BSC)
            return
        # Only the tokens that are sent to the expert have inputs that are not zero.
        input_TC = input_BSC.flatten(0, 1)
        routed_RC = input_TC[input_TC.any(dim=1)]
        self._moments[group].add(routed_RC[None], tokens=len(input_TC))

    def end_layer(self, layer: int, parameters: Parameters) -> None:
        """Score the layer's groups and let their moments go."""
        for group in list(self._moments):
            moments = self._moments.pop(group)
            weight_HC = dense_weight(parameters[f"{group.output}.weight"])
            self._builder.add(group, moments, weight_HC)
