"""Units, unit groups, and the mask of kept units.

A *unit* is the smallest part that pruning removes: one FFN intermediate channel (gate row, up row,
down column) or one KV group (a K head, its V head, the query heads that read them, and their o_proj
columns). The paper calls it a module, a word that means something else in PyTorch. In a layer with
experts, the channels of each expert form a group. An expert without kept channels is removed from
the router as well.

In: family tables and header shapes (see ``groups.py``). Out: :class:`UnitGroup`,
:class:`UnitTable` and :class:`KeepMask`. Holds a few bytes per unit; reads no weights.

Shape suffixes: N all units of a model, U units of one group, C input columns of a group's output
projection (C = U * columns_per_unit).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from frugal_bonsai.errors import OptionError

if TYPE_CHECKING:
    import torch

ATTENTION, FFN = "attention", "ffn"


@dataclass(frozen=True, kw_only=True)
class UnitSlice:
    """The place of a group's units in one tensor.

    Unit u owns the indices ``[start + u*width, start + (u+1)*width)`` of dimension ``axis``.

    Attributes:
        tensor: full name of the tensor.
        axis: the dimension.
        width: number of indices that one unit owns.
        start: first index of the first unit.
        joint: all units together own the ``width`` indices from ``start`` on, which are removed
            with the group's last unit: an expert's row of the router.
    """

    tensor: str
    axis: int
    width: int
    start: int = 0
    joint: bool = False

    def owned(self, keep_U: torch.Tensor) -> torch.Tensor:
        """Return the mask of kept indices from ``start`` on, given the mask of kept units."""
        units_U = keep_U.any().reshape(1) if self.joint else keep_U
        return units_U.repeat_interleave(self.width)


@dataclass(frozen=True, kw_only=True)
class UnitGroup:
    """The units of one kind in one layer.

    Attributes:
        layer: index of the layer.
        kind: ``"attention"`` or ``"ffn"``.
        count: number of units.
        unit_parameters: number of parameters of one unit.
        slices: the rows and columns of the units, tensor by tensor.
        output: name of the output projection's module inside the layer (``self_attn.o_proj``).
            Zeroing a unit's input columns of it equals removing the unit.
        output_weight: full name of that projection's weight.
        columns_per_unit: input columns of the output projection that one unit owns.
        removable: False if no layout can hold the layer without one of the units.
        expert: index of the expert; None in a layer without experts.
        joint_parameters: parameters that are removed with the last unit.
    """

    layer: int
    kind: str
    count: int
    unit_parameters: int
    slices: tuple[UnitSlice, ...]
    output: str
    output_weight: str
    columns_per_unit: int
    removable: bool = True
    expert: int | None = None
    joint_parameters: int = 0

    @property
    def columns(self) -> int:
        """Input width of the output projection."""
        return self.count * self.columns_per_unit

    @property
    def name(self) -> str:
        """Readable name, ``layer 3 ffn`` or ``layer 3 expert 5 ffn``."""
        expert = "" if self.expert is None else f"expert {self.expert} "
        return f"layer {self.layer} {expert}{self.kind}"


@dataclass(frozen=True)
class UnitTable:
    """All groups of a model in order (layer, then kind), and their places in a flat vector."""

    groups: tuple[UnitGroup, ...]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Flat index of each group's first unit, and N at the end."""
        starts = [0]
        for group in self.groups:
            starts.append(starts[-1] + group.count)
        return tuple(starts)

    @property
    def units(self) -> int:
        """N, the number of units."""
        return self.starts[-1]

    @cached_property
    def parameters(self) -> int:
        """Parameters of all units together."""
        return sum(g.count * g.unit_parameters + g.joint_parameters for g in self.groups)

    @cached_property
    def _position(self) -> dict[tuple[int, str, int | None], int]:
        return {(g.layer, g.kind, g.expert): at for at, g in enumerate(self.groups)}

    @cached_property
    def has_experts(self) -> bool:
        """Whether the model has experts."""
        return any(group.expert is not None for group in self.groups)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds in order of first appearance."""
        return tuple(dict.fromkeys(group.kind for group in self.groups))

    def of_layer(self, layer: int) -> tuple[UnitGroup, ...]:
        """Return the groups of one layer."""
        return tuple(group for group in self.groups if group.layer == layer)

    def position(self, group: UnitGroup) -> int:
        """Return the index of a group in :attr:`groups`."""
        return self._position[group.layer, group.kind, group.expert]

    def span(self, group: UnitGroup) -> slice:
        """Return the group's range in a flat vector over all units."""
        at = self.position(group)
        return slice(self.starts[at], self.starts[at + 1])

    def unit_parameters_N(self) -> torch.Tensor:
        """Return the number of parameters of each unit, float64 ``[N]``."""
        import torch

        return torch.cat(
            [torch.full((g.count,), g.unit_parameters, dtype=torch.float64) for g in self.groups]
        )


class KeepMask:
    """The mask of kept units: True = kept.

    Args:
        table: the units of the dense model.
        keep_N: bool ``[N]`` on the CPU; all True by default.

    Raises:
        OptionError: ``keep_N`` has another shape or dtype.
    """

    def __init__(self, table: UnitTable, keep_N: torch.Tensor | None = None) -> None:
        import torch

        self.table = table
        self.keep_N = torch.ones(table.units, dtype=torch.bool) if keep_N is None else keep_N
        if self.keep_N.shape != (table.units,) or self.keep_N.dtype != torch.bool:
            raise OptionError(
                f"keep mask: expected bool [{table.units}], found {self.keep_N.dtype} "
                f"{list(self.keep_N.shape)}"
            )

    def of(self, group: UnitGroup) -> torch.Tensor:
        """Return the group's part of the mask, bool ``[U]``, a view."""
        return self.keep_N[self.table.span(group)]

    def kept(self, group: UnitGroup) -> int:
        """Return the number of kept units of a group."""
        return int(self.of(group).sum())

    def columns(self, group: UnitGroup) -> torch.Tensor:
        """Return the mask of kept input columns of a group's output projection, bool ``[C]``."""
        return self.of(group).repeat_interleave(group.columns_per_unit)

    def removed_parameters(self) -> int:
        """Return the parameters of the removed units, joint parameters included."""
        removed = 0
        for group in self.table.groups:
            kept = self.kept(group)
            removed += (group.count - kept) * group.unit_parameters
            removed += 0 if kept else group.joint_parameters
        return removed

    def dropped_experts(self, layer: int) -> tuple[int, ...]:
        """Return the indices of a layer's experts that keep no channel and are removed."""
        groups = self.table.of_layer(layer)
        return tuple(g.expert for g in groups if g.expert is not None and not self.kept(g))

    def dropped_layers(self) -> tuple[int, ...]:
        """Return the indices of layers that keep no unit and are removed, norms included."""
        alive = {group.layer for group in self.table.groups if self.kept(group)}
        return tuple(layer for layer, _ in iterate_layers(self.table) if layer not in alive)

    def without_layers(self, layers: Collection[int]) -> KeepMask:
        """Return a new mask that drops these layers."""
        keep_N = self.keep_N.clone()
        for group in self.table.groups:
            if group.layer in layers:
                keep_N[self.table.span(group)] = False
        return KeepMask(self.table, keep_N)

    def without(self, indices_K: torch.Tensor) -> KeepMask:
        """Return a new mask without the units at these flat indices (int64 ``[K]``)."""
        keep_N = self.keep_N.clone()
        keep_N[indices_K] = False
        return KeepMask(self.table, keep_N)

    def counts(self) -> dict[str, list[int]]:
        """Return kind -> number of kept units in each layer, summed over its experts."""
        layers = 1 + max((group.layer for group in self.table.groups), default=-1)
        counts = {kind: [0] * layers for kind in self.table.kinds}
        for group in self.table.groups:
            counts[group.kind][group.layer] += self.kept(group)
        return counts

    def experts(self) -> list[int]:
        """Return the number of kept experts in each layer; empty for a model without experts."""
        if not self.table.has_experts:
            return []
        return [
            sum(group.expert is not None and self.kept(group) > 0 for group in groups)
            for _, groups in iterate_layers(self.table)
        ]

    def layers_with(self, kind: str) -> list[int]:
        """Return the layers that are left and have units of a kind."""
        dropped = self.dropped_layers()
        return [
            layer
            for layer, groups in iterate_layers(self.table)
            if layer not in dropped and any(group.kind == kind for group in groups)
        ]

    def counts_with_experts(self) -> dict[str, list[int]]:
        """Return :meth:`counts`, with :meth:`experts` under ``experts`` if there are any."""
        experts = {"experts": self.experts()} if self.table.has_experts else {}
        return self.counts() | experts

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KeepMask):
            return NotImplemented
        import torch

        return self.table == other.table and torch.equal(self.keep_N, other.keep_N)

    __hash__ = None  # type: ignore[assignment]  # it holds a tensor that can change

    def __repr__(self) -> str:
        return f"KeepMask({int(self.keep_N.sum())} of {self.table.units} kept)"


def iterate_layers(table: UnitTable) -> Iterator[tuple[int, tuple[UnitGroup, ...]]]:
    """Yield (index, groups) of every layer in order."""
    layers: dict[int, list[UnitGroup]] = {}
    for group in table.groups:
        layers.setdefault(group.layer, []).append(group)
    for layer, groups in layers.items():
        yield layer, tuple(groups)
