"""How far each round goes: its target, its cut, whether there is another one.

In: settings, layout rules, the size of the dense blocks. Out: shares and parameters, and the cut
that a round would make by given curves. Holds no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from frugal_bonsai.bonsai.selection.cut import Curve, can_go_nearer, cut
from frugal_bonsai.bonsai.selection.extent import LATER_STEP, next_goal
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.model.layout import LayoutRules
from frugal_bonsai.model.units import KeepMask


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The way to the target sparsity.

    Attributes:
        settings: of the prune.
        rules: of the layout.
        blocks: parameters of the dense model's blocks.
        latency: what a unit of each kind takes on this machine, for the objective of that name.
    """

    settings: PruneSettings
    rules: LayoutRules
    blocks: int
    latency: Mapping[str, float] | None = None

    @property
    def final_parameters(self) -> int:
        """Parameters that are gone in the end."""
        return round(self.settings.sparsity * self.blocks)

    def goes_on(self, mask: KeepMask) -> bool:
        """Whether another round brings the mask nearer to the target."""
        return can_go_nearer(mask, self.final_parameters, self.rules, self.settings.allocation)

    def goal(self, mask: KeepMask) -> float:
        """The sparsity that the next round aims at."""
        return next_goal(self.settings, mask.removed_parameters() / self.blocks)

    def share(self, mask: KeepMask) -> float:
        """Share of the alive units that the next round takes."""
        removed = mask.removed_parameters()
        return (self.goal(mask) * self.blocks - removed) / (mask.table.parameters - removed)

    def cut(self, mask: KeepMask, curves: tuple[Curve, ...]) -> tuple[KeepMask, int]:
        """What the next round keeps, and the parameters that it aimed to have removed.

        The same mask when the layout leaves nothing to remove.
        """
        goal = self.goal(mask)
        while True:
            target = round(goal * self.blocks)
            cut_mask = cut(
                mask,
                curves,
                target,
                self.rules,
                final_parameters=self.final_parameters,
                objective=self.settings.objective,
                latency=self.latency,
                allocation=self.settings.allocation,
            )
            if cut_mask != mask or goal >= self.settings.sparsity:
                return cut_mask, target
            # The layout's next legal size may be farther away than one step.
            step = self.settings.step or LATER_STEP
            goal = min(goal + step, self.settings.sparsity)
