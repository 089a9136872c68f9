"""Stand-ins: what the units that surely stay say about those that a mask switches off.

In: a group's Gram matrix and prior, while they are at hand. Out: for its pool (the units that the
next round may remove) the best linear guess of their activations from the others'. In a masked
evaluation a unit that is off is replaced by that guess instead of zero, which is the model after
optimal compensation by the rest: a unit's relevance *after* recovery, not before it. Without it
attention, which little can replace, looks as dispensable as channels, which much can.
Holds one matrix ``[P, C-P]`` at a time, on an accelerator another in pinned host memory; they lie
in the round's folder.

Shape suffixes: P columns of a pool, C alive columns, A alive units of a group, B windows of a
micro-batch, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from frugal_bonsai.accelerator import has_streams, to_device
from frugal_bonsai.bonsai.importance.gram import Moments
from frugal_bonsai.bonsai.masks.design import pool_size
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.units import UnitGroup

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class StandInWriter:
    """Makes a group's stand-ins and saves them.

    Attributes:
        share: of a group's alive units that its pool holds next.
        damping: of the Gram matrix, the prior's and recovery's lambda.
        rules: of the layout: a group that it cannot cut has no stand-ins.
        save: called with the group and its tensors.
    """

    share: float
    rules: LayoutRules
    damping: float
    save: Callable[[UnitGroup, Tensors], None]

    def add(self, group: UnitGroup, moments: Moments, score_A: torch.Tensor) -> None:
        """Save one group's; a group whose last unit is left has none.

        A projection whose removed inputs are replaced by their guess is the projection after
        optimal compensation by the columns outside the pool.
        """
        size = pool_size(len(score_A), self.share)
        if size == 0 or not self.rules.can_cut(group, len(score_A)):
            return
        width = group.columns_per_unit
        units = score_A.argsort(stable=True)[:size].sort().values
        columns_P = (units[:, None] * width + torch.arange(width, device=units.device)).flatten()
        factor = moments.factor(self.damping, where=group.name)
        self.save(group, {"columns": columns_P.cpu(), "matrix": factor.guess(columns_P)})


class StandIns:
    """Gives a masked sweep the stand-ins of one group after the other.

    On an accelerator those of the next group are read into pinned memory meanwhile.

    Args:
        read: the saved tensors of a group, None where there are none.
        groups: in the order in which a sweep asks for them.
        device: where masks are evaluated; None reads nothing ahead.
    """

    def __init__(
        self,
        read: Callable[[UnitGroup], Tensors | None],
        groups: Sequence[UnitGroup] = (),
        device: torch.device | None = None,
    ) -> None:
        self._read = read
        self._group: UnitGroup | None = None
        self._now: Tensors | None = None
        self._next = dict(zip(groups, (*groups[1:], *groups[:1]), strict=True))
        self._ahead: tuple[UnitGroup, Future[Tensors | None]] | None = None
        streams = device is not None and has_streams(device)
        self._reader = ThreadPoolExecutor(max_workers=1) if streams else None

    def of(
        self, group: UnitGroup, input_BSC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The pool's columns and the guess of their inputs ``[B, S, P]``."""
        if group != self._group:
            # One group's at a time; when memory runs out meanwhile, this is begun anew.
            self._group = self._now = None
            self._now = self._load(group, input_BSC)
            self._group = group
        if self._now is None:
            return None
        core_BSK = input_BSC[..., self._now["core"]]
        return self._now["columns"], core_BSK @ self._now["matrix"].T

    def _load(self, group: UnitGroup, input_BSC: torch.Tensor) -> Tensors | None:
        """A group's tensors on the inputs' device, in their dtype."""
        saved, device = self._saved(group), input_BSC.device
        if saved is None:
            return None
        core_C = torch.ones(input_BSC.shape[-1], dtype=torch.bool)
        core_C[saved["columns"]] = False
        return {
            "columns": to_device(saved["columns"], device),
            "core": to_device(core_C.nonzero().flatten(), device),
            # As it is stored first: the device converts faster, and half as much is copied.
            "matrix": to_device(saved["matrix"], device).to(input_BSC.dtype),
        }

    def _saved(self, group: UnitGroup) -> Tensors | None:
        """A group's tensors on the host; the next group's are asked for."""
        if self._reader is None:
            return self._read(group)
        ahead, self._ahead = self._ahead, None
        saved = ahead[1].result() if ahead is not None and ahead[0] == group else self._read(group)
        following = self._next[group]
        self._ahead = following, self._reader.submit(self._pinned, following)
        return saved

    def _pinned(self, group: UnitGroup) -> Tensors | None:
        """A group's tensors in pinned memory."""
        saved = self._read(group)
        return saved and {name: value.pin_memory() for name, value in saved.items()}
