"""Imputation: predict the inputs of removed units from the units that surely stay.

In: a group's Gram matrix and scores, while both exist. Out: for the group's pool (the units that
the next round may remove) the best linear prediction of their activations from the other
activations. A masked evaluation replaces a removed unit by this prediction instead of zero, which
equals the model after optimal compensation by the other units. So a unit's relevance is measured
*after* reconstruction. With zeros instead, attention, which other units can hardly replace, would
look as dispensable as FFN channels, which they can replace well.

Memory: one matrix ``[P, C-P]`` at a time, on an accelerator one more in pinned host memory. The
matrices lie in the round's folder.

Shape suffixes: P columns of a pool, C remaining columns, K columns outside the pool, A remaining
units of a group, B windows of a micro-batch, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from frugal_bonsai.accelerator import has_streams, to_device
from frugal_bonsai.bonsai.importance.gram import Moments
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.units import UnitGroup

# "columns": int64 [P], the pool's columns; "matrix": fp16 [P, C-P], their regression on the others.
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class ImputationWriter:
    """Computes the imputations of one group after the other and saves them.

    Attributes:
        share: share of a group's remaining units that its next pool holds.
        damping: of the Gram matrix, as a share of its mean diagonal.
        rules: of the layout; a group that the layout cannot cut gets no imputation.
        save: called with the group and its tensors.
    """

    share: float
    rules: LayoutRules
    damping: float
    save: Callable[[UnitGroup, Tensors], None]

    def add(self, group: UnitGroup, moments: Moments, score_A: torch.Tensor) -> None:
        """Save one group's imputation; a group with one unit left has none.

        A projection whose removed inputs are imputed equals the projection after optimal
        compensation by the columns outside the pool.
        """
        size = pool_size(len(score_A), self.share)
        if size == 0 or not self.rules.can_cut(group, len(score_A)):
            return
        width = group.columns_per_unit
        units = score_A.argsort(stable=True)[:size].sort().values
        columns_P = (units[:, None] * width + torch.arange(width, device=units.device)).flatten()
        factor = moments.factor(self.damping, where=group.name)
        self.save(group, {"columns": columns_P.cpu(), "matrix": factor.regression(columns_P)})


def pool_size(remaining: int, share: float) -> int:
    """Return the number of units in a group's pool: a share of them, at least one, never all."""
    return min(max(1, round(share * remaining)), remaining - 1)


class Imputations:
    """Imputes the inputs of one group after the other during a masked sweep.

    On an accelerator a thread reads the next group's tensors into pinned memory in the background.

    Args:
        read: returns the saved tensors of a group, None where there are none.
        groups: in the order in which a sweep visits them.
        device: where masks are evaluated; None reads nothing in the background.
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
        """Return the pool's columns ``[P]`` and their imputed inputs ``[B, S, P]``, or None."""
        if group != self._group:
            # Only one group is held. Where memory runs out in between, the load starts again.
            self._group = self._now = None
            self._now = self._load(group, input_BSC)
            self._group = group
        if self._now is None:
            return None
        core_BSK = input_BSC[..., self._now["core"]]
        return self._now["columns"], core_BSK @ self._now["matrix"].T

    def _load(self, group: UnitGroup, input_BSC: torch.Tensor) -> Tensors | None:
        """Return a group's tensors on the inputs' device, in the inputs' dtype."""
        saved, device = self._take(group), input_BSC.device
        if saved is None:
            return None
        core_C = torch.ones(input_BSC.shape[-1], dtype=torch.bool)
        core_C[saved["columns"]] = False
        return {
            "columns": to_device(saved["columns"], device),
            "core": to_device(core_C.nonzero().flatten(), device),
            # Copied in fp16: the device converts faster, and half as much is copied.
            "matrix": to_device(saved["matrix"], device).to(input_BSC.dtype),
        }

    def _take(self, group: UnitGroup) -> Tensors | None:
        """Return a group's tensors on the host; start to read the next group's."""
        if self._reader is None:
            return self._read(group)
        ahead, self._ahead = self._ahead, None
        saved = ahead[1].result() if ahead is not None and ahead[0] == group else self._read(group)
        following = self._next[group]
        self._ahead = following, self._reader.submit(self._read_pinned, following)
        return saved

    def _read_pinned(self, group: UnitGroup) -> Tensors | None:
        saved = self._read(group)
        return saved and {name: value.pin_memory() for name, value in saved.items()}
