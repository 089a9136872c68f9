"""The schedule: how much each round removes, and how many calibration windows it uses.

In: :class:`~frugal_bonsai.bonsai.settings.PruneSettings` and sizes. Out: goals as sparsities and
numbers of windows. The search follows them; the planner and the time model count with them, without
importing torch. Holds no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from frugal_bonsai.bonsai.settings import PruneSettings

if TYPE_CHECKING:
    from frugal_bonsai.model.layout import LayoutRules
    from frugal_bonsai.model.units import KeepMask

# Shares removed per round where the user names none. In a whole model the first quarter is chosen
# as well at once; later, masks predict small steps better.
FIRST_STEP, LATER_STEP = 0.25, 0.1
# Rounds before the last use this many tokens per column of the widest projection for statistics
# and reconstruction (or all windows, if there are fewer). That is enough to choose units.
TOKENS_PER_COLUMN = 24
# Candidates are reconstructed on this many tokens per column. With fewer, cuts that need little
# data look better than they are after the last reconstruction, which has all windows.
TRIAL_TOKENS_PER_COLUMN = 48
# Tokens that fit the scale of the logits; the error of the scale costs less than 0.001 nats.
_SCALE_TOKENS = 8192
# Most scales that logit_scale.py tries (0.9 to 2.1), for both models.
MOST_SCALES = 2 * 13


def next_goal(settings: PruneSettings, done: float) -> float:
    """Return the sparsity at which a round aims that begins at the sparsity ``done``."""
    step = settings.step or (LATER_STEP if done else FIRST_STEP)
    goal = min(done + step, settings.sparsity)
    # The last round removes all that is left, so that no sliver is left for another round.
    return settings.sparsity if settings.sparsity - goal < 0.2 * step else goal


def round_goals(settings: PruneSettings, done: float = 0.0) -> list[float]:
    """Return the sparsities at which all further rounds end, if each of them reaches its goal."""
    goals: list[float] = []
    while done < settings.sparsity:
        done = next_goal(settings, done)
        goals.append(done)
    return goals


def round_windows(settings: PruneSettings, columns: int, window: int, windows: int) -> int:
    """Return the number of calibration windows that rounds before the last use.

    Args:
        settings: Settings of the prune. Without reconstruction every round uses all windows.
        columns: Columns of the widest output projection.
        window: Tokens of a window.
        windows: Calibration windows in all.
    """
    if not settings.recovery:
        return windows
    return min(windows, -(-TOKENS_PER_COLUMN * columns // window))


def trial_windows(columns: int, window: int, windows: int) -> tuple[int, int]:
    """Return the numbers of windows that fit a candidate and that judge it.

    At most two thirds of the windows fit, and a third as many others judge; a single window
    leaves none to judge. Candidates are never judged by the windows that they were fitted to.

    Args:
        columns: Columns of the widest output projection.
        window: Tokens of a window.
        windows: Calibration windows in all.
    """
    fitted = min(-(-TRIAL_TOKENS_PER_COLUMN * columns // window), max(1, windows * 2 // 3))
    return fitted, min(max(1, fitted // 3), windows - fitted)


def scale_windows(window: int, windows: int) -> int:
    """Return the number of windows that fit the scale of the logits."""
    return min(windows, max(1, _SCALE_TOKENS // window))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The way to the target sparsity.

    Attributes:
        settings: Settings of the prune.
        rules: Rules of the output layout.
        blocks: Number of parameters of the dense model's blocks.
        latency: Milliseconds of one unit of each kind, for the objective of that name.
    """

    settings: PruneSettings
    rules: LayoutRules
    blocks: int
    latency: Mapping[str, float] | None = None

    @property
    def final_parameters(self) -> int:
        """Number of parameters removed at the target."""
        return round(self.settings.sparsity * self.blocks)

    def goal(self, mask: KeepMask) -> float:
        """Return the sparsity at which the next round aims."""
        return next_goal(self.settings, mask.removed_parameters() / self.blocks)

    def share(self, mask: KeepMask) -> float:
        """Return the share of the alive units that the next round removes."""
        return removed_share(mask, self.goal(mask) * self.blocks)


def removed_share(mask: KeepMask, target_parameters: float) -> float:
    """Return the share of the alive units that goes until this many parameters are removed."""
    removed = mask.removed_parameters()
    return (target_parameters - removed) / (mask.table.parameters - removed)
