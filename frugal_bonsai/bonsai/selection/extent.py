"""How far each round of a prune goes, and how much of the calibration text it uses.

In: :class:`~frugal_bonsai.bonsai.settings.PruneSettings` and sizes. Out: goals as sparsities, and
numbers of windows; the search follows them, the planner and the time model count with them.
"""

from __future__ import annotations

from frugal_bonsai.bonsai.settings import PruneSettings

# Rounds before the last take statistics, and recover, on this many tokens for each column of the
# widest projection (or on all windows, where they have no more): enough to choose units by.
TOKENS_PER_COLUMN = 24
# Shares that rounds remove where the user names none. In a whole model the first quarter is chosen
# as well at once; later, masks foretell small steps better.
FIRST_STEP, LATER_STEP = 0.25, 0.1
# A trial recovers each cut on this many: with fewer, cuts that need little data look better than
# they are after the last recovery, which has all windows.
TRIAL_TOKENS_PER_COLUMN = 48
# Enough for one factor: its error then costs less than a thousandth of a nat.
_SCALE_TOKENS = 8192
# Factors that the scale of the logits tries at most, of both models (logit_scale.py: 0.9 to 2.1).
MOST_SCALES = 2 * 13


def next_goal(settings: PruneSettings, done: float) -> float:
    """The sparsity that a round aims at which begins at the sparsity ``done``."""
    step = settings.step or (LATER_STEP if done else FIRST_STEP)
    goal = min(done + step, settings.sparsity)
    # The last round removes just what is left: no sliver of a round behind it.
    return settings.sparsity if settings.sparsity - goal < 0.2 * step else goal


def round_goals(settings: PruneSettings, done: float = 0.0) -> list[float]:
    """The sparsities at which all further rounds end, if each of them reaches its aim."""
    goals: list[float] = []
    while done < settings.sparsity:
        done = next_goal(settings, done)
        goals.append(done)
    return goals


def scale_windows(window: int, windows: int) -> int:
    """Windows that the scale of the logits is found on."""
    return min(windows, max(1, _SCALE_TOKENS // window))


def trial_windows(columns: int, window: int, windows: int) -> tuple[int, int]:
    """How many calibration windows a trial recovers on, and by how many others it is judged.

    Two thirds at most, and a third as many; of one window no others are left. Judged by the windows
    that it has learnt from, a cut would look as good as it can be learnt by heart.

    Args:
        columns: of the widest output projection.
        window: tokens of a window.
        windows: calibration windows in all.
    """
    fitted = min(-(-TRIAL_TOKENS_PER_COLUMN * columns // window), max(1, windows * 2 // 3))
    return fitted, min(max(1, fitted // 3), windows - fitted)


def round_windows(settings: PruneSettings, columns: int, window: int, windows: int) -> int:
    """How many calibration windows the rounds before the last use.

    Args:
        settings: of the prune; without recovery, statistics are all there is: all windows.
        columns: of the widest output projection.
        window: tokens of a window.
        windows: calibration windows in all.
    """
    if not settings.recovery:
        return windows
    return min(windows, -(-TOKENS_PER_COLUMN * columns // window))
