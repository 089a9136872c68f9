"""Calibration windows, and the part that each round uses.

In: token windows. Out: calibration windows, held-out windows, and the windows of a round. Text that
the model writes is made in written_text.py. Holds the windows.

Shape suffixes: N calibration windows, n windows, S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.selection.schedule import round_windows, trial_windows
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.errors import CalibrationError

# Calibration tokens when the user names no number of windows: 32 windows of 2,048.
DEFAULT_TOKENS = 65_536
MOST_HELD_OUT = 16


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Windows to search on and windows to report on.

    Attributes:
        windows_NS: Windows of the search, int64 ``[N, S]``.
        held_out_NS: Windows that the search never sees, int64 ``[K, S]``.
    """

    windows_NS: torch.Tensor
    held_out_NS: torch.Tensor


def window_count(window: int, windows: int | None) -> int:
    """Return the user's number of windows, else enough for :data:`DEFAULT_TOKENS`."""
    return windows if windows is not None else max(32, DEFAULT_TOKENS // window)


def held_out_count(windows: int) -> int:
    """Return the number of held-out windows beside this many calibration windows."""
    return max(1, min(MOST_HELD_OUT, windows // 8))


def split_windows(windows_nS: torch.Tensor, windows: int, what: str) -> Calibration:
    """Take calibration windows from the start and held-out windows from the end.

    Args:
        windows_nS: All windows of the text.
        windows: Calibration windows at most.
        what: Name of the text, for the error.

    Raises:
        CalibrationError: The text gives fewer than two windows.
    """
    if len(windows_nS) < 2:
        raise CalibrationError(
            f"{what}: gives {len(windows_nS)} window of {windows_nS.shape[1]} tokens, expected at "
            f"least two (one to search on, one held out); use a longer text or a shorter --window"
        )
    held_out = held_out_count(min(windows, len(windows_nS) - 1))
    most = min(windows, len(windows_nS) - held_out)
    return Calibration(windows_NS=windows_nS[:most], held_out_NS=windows_nS[-held_out:])


def round_generator(seed: int, number: int) -> torch.Generator:
    """Return a generator that depends on seed and number alone, so that a resume repeats it."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


class RoundWindows:
    """The calibration windows that each round uses, drawn by seed and round.

    Args:
        windows_NS: All calibration windows.
        settings: Settings of the prune.
        columns: Columns of the widest output projection.
    """

    def __init__(self, windows_NS: torch.Tensor, settings: PruneSettings, columns: int) -> None:
        self.all_NS, self._settings, self._columns = windows_NS, settings, columns

    def of_last(self, written_nS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the windows of the last round, and the places of the calibration windows.

        They are mixed, because channel updates take the windows in parts.

        Args:
            written_nS: Windows that the dense model wrote, int64; none are allowed.
        """
        windows_NS = torch.cat([self.all_NS, written_nS])
        if not len(written_nS):
            return windows_NS, torch.arange(len(windows_NS))
        order = torch.randperm(len(windows_NS), generator=self._generator(40_000))
        return windows_NS[order], (order < len(self.all_NS)).nonzero().flatten()

    def of_round(self, number: int) -> torch.Tensor:
        """Return the windows of a round before the last, in the order of the text."""
        windows, window = self.all_NS.shape
        count = round_windows(self._settings, self._columns, window, windows)
        drawn = torch.randperm(windows, generator=self._generator(20_000 + number))[:count]
        return self.all_NS[drawn.sort().values]

    def of_trial(self, number: int) -> tuple[torch.Tensor, int]:
        """Return the windows of a round's candidates, and how many at the end judge them."""
        windows, window = self.all_NS.shape
        fitted, held_out = trial_windows(self._columns, window, windows)
        # Both come from all over the text, because neighbouring windows are alike.
        order = torch.randperm(windows, generator=self._generator(30_000 + number))
        return self.all_NS[order[: fitted + held_out]], held_out

    def _generator(self, number: int) -> torch.Generator:
        return round_generator(self._settings.seed, number)
