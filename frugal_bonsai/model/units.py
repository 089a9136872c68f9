"""Units, groups of them, and the mask that says which are kept.

A *unit* is what is kept or removed whole: one FFN intermediate channel (gate row, up row, down
column) or one KV group (a K head, its V head, the query heads that read them, and their o_proj
columns). The paper says "module", a word that PyTorch has taken. Where a layer has experts, each
expert's channels are a group of their own, and an expert that keeps none of them is gone whole: it
leaves the router too.

In: family tables and header shapes (see ``family.py``). Out: :class:`UnitGroup`, :class:`UnitTable`
and :class:`KeepMask`. Holds a few bytes per unit; reads no weights.

Shape suffixes: N all units of a model, U units of one group, C input columns of a group's output
projection (C = U * columns_per_unit).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from frugal_bonsai.errors import OptionError

if TYPE_CHECKING:
    import torch

ATTENTION, FFN = "attention", "ffn"


@dataclass(frozen=True, kw_only=True)
class UnitSlice:
    """Where the units of a group sit in one tensor.

    Unit u owns indices ``[start + u*width, start + (u+1)*width)`` of dimension ``axis``.
    Everything before ``start`` and behind the last unit stays whole. A ``joint`` slice, an expert's
    row of the router, is ``width`` indices from ``start`` that go with the group's last unit.
    """

    tensor: str  # full tensor name in the checkpoint
    axis: int
    width: int
    start: int = 0
    joint: bool = False

    def owned(self, keep_U: torch.Tensor) -> torch.Tensor:
        """Bool: which of the indices from ``start`` on stay, given the group's units that do."""
        units_U = keep_U.any().reshape(1) if self.joint else keep_U
        return units_U.repeat_interleave(self.width)


@dataclass(frozen=True, kw_only=True)
class UnitGroup:
    """The units of one kind in one layer.

    Attributes:
        layer: index of the layer.
        kind: ``"attention"`` or ``"ffn"``.
        count: number of units.
        unit_parameters: parameters that disappear with one unit.
        slices: the rows and columns that a unit owns.
        output: name of the output projection's module inside the layer (``self_attn.o_proj``);
            zeroing its input columns equals removing the unit.
        output_weight: full name of that projection's weight.
        columns_per_unit: input columns of the output projection that one unit owns.
        removable: False where no layout can do without any of them.
        expert: which expert's channels these are; None where the layer has no experts.
        joint_parameters: parameters that go with the last unit.
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
    """All groups of a model in order (layer, then kind), and where each starts in a flat vector."""

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
        """Whether layers have experts."""
        return any(group.expert is not None for group in self.groups)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds in order of first appearance."""
        return tuple(dict.fromkeys(group.kind for group in self.groups))

    def of_layer(self, layer: int) -> tuple[UnitGroup, ...]:
        """The groups of one layer."""
        return tuple(group for group in self.groups if group.layer == layer)

    def position(self, group: UnitGroup) -> int:
        """Index of a group in :attr:`groups`."""
        return self._position[group.layer, group.kind, group.expert]

    def span(self, group: UnitGroup) -> slice:
        """The group's place in a flat vector over all units."""
        at = self.position(group)
        return slice(self.starts[at], self.starts[at + 1])

    def unit_parameters_N(self) -> torch.Tensor:
        """Parameters of each unit, float64 ``[N]``."""
        import torch

        return torch.cat(
            [torch.full((g.count,), g.unit_parameters, dtype=torch.float64) for g in self.groups]
        )


class KeepMask:
    """Which units are kept: True = kept.

    Args:
        table: the units of the dense model.
        keep_N: bool ``[N]`` on the CPU; all True when left out.
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
        """Bool ``[U]``: the group's part (a view)."""
        return self.keep_N[self.table.span(group)]

    def kept(self, group: UnitGroup) -> int:
        """Number of the group's units that are kept."""
        return int(self.of(group).sum())

    def columns(self, group: UnitGroup) -> torch.Tensor:
        """Bool ``[C]``: kept input columns of the group's output projection."""
        return self.of(group).repeat_interleave(group.columns_per_unit)

    def removed_parameters(self) -> int:
        """Parameters of the removed units, and of what goes with a group's last one."""
        removed = 0
        for group in self.table.groups:
            kept = self.kept(group)
            removed += (group.count - kept) * group.unit_parameters
            removed += 0 if kept else group.joint_parameters
        return removed

    def dropped_experts(self, layer: int) -> tuple[int, ...]:
        """Experts of a layer that keep no channel: the whole expert goes, router row and all."""
        groups = self.table.of_layer(layer)
        return tuple(g.expert for g in groups if g.expert is not None and not self.kept(g))

    def dropped_layers(self) -> tuple[int, ...]:
        """Layers that keep no unit at all: the whole layer goes, norms and biases too."""
        alive = {group.layer for group in self.table.groups if self.kept(group)}
        return tuple(layer for layer, _ in iterate_layers(self.table) if layer not in alive)

    def without_layers(self, layers: Collection[int]) -> KeepMask:
        """A new mask that drops these layers."""
        keep_N = self.keep_N.clone()
        for group in self.table.groups:
            if group.layer in layers:
                keep_N[self.table.span(group)] = False
        return KeepMask(self.table, keep_N)

    def without(self, indices_K: torch.Tensor) -> KeepMask:
        """A new mask with the units at these flat indices (int64 ``[K]``) removed."""
        keep_N = self.keep_N.clone()
        keep_N[indices_K] = False
        return KeepMask(self.table, keep_N)

    def counts(self) -> dict[str, list[int]]:
        """Kept units per kind, one number a layer: of all its experts together."""
        layers = 1 + max((group.layer for group in self.table.groups), default=-1)
        counts = {kind: [0] * layers for kind in self.table.kinds}
        for group in self.table.groups:
            counts[group.kind][group.layer] += self.kept(group)
        return counts

    def experts(self) -> list[int]:
        """Experts that are kept, one number a layer; empty where layers have none."""
        if not self.table.has_experts:
            return []
        return [
            sum(group.expert is not None and self.kept(group) > 0 for group in groups)
            for _, groups in iterate_layers(self.table)
        ]

    def counts_with_experts(self) -> dict[str, list[int]]:
        """:meth:`counts`, and ``experts`` where there are any; for reports."""
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

    # -- JSON: masks are shared without weights -------------------------------------------------
    def to_json(self) -> dict[str, list[list[int]]]:
        """Removed units as ``{kind: [[index, ...] a layer]}``; a list an expert where there are."""
        removed: dict[str, list[list[int]]] = {kind: [] for kind in self.table.kinds}
        for group in self.table.groups:
            removed[group.kind].append((~self.of(group)).nonzero().flatten().tolist())
        return removed

    @classmethod
    def from_json(
        cls, table: UnitTable, removed: Mapping[str, Sequence[Sequence[int]]]
    ) -> KeepMask:
        """Inverse of :meth:`to_json`.

        Raises:
            OptionError: if a kind, layer or index does not exist in this model.
        """
        mask = cls(table)
        for kind, layers in removed.items():
            groups = [group for group in table.groups if group.kind == kind]
            if len(groups) != len(layers):
                what = "experts" if groups and groups[0].expert is not None else "layers"
                raise OptionError(
                    f"mask: kind {kind!r} lists {len(layers)} {what}, the model has {len(groups)}"
                )
            for group, indices in zip(groups, layers, strict=True):
                if any(not 0 <= index < group.count for index in indices):
                    raise OptionError(
                        f"mask: {group.name} names a unit outside 0..{group.count - 1}"
                    )
                mask.of(group)[list(indices)] = False
        return mask


def iterate_layers(table: UnitTable) -> Iterator[tuple[int, tuple[UnitGroup, ...]]]:
    """Yield ``(layer, its groups)`` in order."""
    layers: dict[int, list[UnitGroup]] = {}
    for group in table.groups:
        layers.setdefault(group.layer, []).append(group)
    for layer, groups in layers.items():
        yield layer, tuple(groups)
