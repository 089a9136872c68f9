"""A progress bar for notebooks.

In: the calls of a :class:`~frugal_bonsai.progress.Progress`. Out: a bar of tqdm for each sweep,
which is a widget in a notebook, and notes as text.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from frugal_bonsai.progress import Progress, Silent


class BarProgress:
    """Shows one bar, of the sweep that runs, and prints notes above it."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without ipywidgets tqdm warns, and prints text
            from tqdm.auto import tqdm
        self._make: Any = tqdm
        self._bar: Any = None
        self._round = ""

    def caps(self, host_bytes: int, gpu_bytes: int | None) -> None:
        """Ignore the caps."""

    def round(self, number: int, rounds: int, sparsity: float) -> None:
        """Name the round in the bars that follow."""
        self._round = f"round {number}/{rounds}, {sparsity:.0%} removed: "

    def sweep(self, name: str, steps: int, tokens_per_step: int) -> None:
        """Show a new bar."""
        self._close()
        self._bar = self._make(total=steps or None, desc=f"{self._round}{name}", leave=False)

    def step(self, detail: str = "") -> None:
        """Move the bar; remove it at its end."""
        if self._bar is None:
            return
        if detail:
            self._bar.set_postfix_str(detail, refresh=False)
        self._bar.update(1)
        if self._bar.total is not None and self._bar.n >= self._bar.total:
            self._close()

    def note(self, text: str) -> None:
        """Print a note."""
        self._make.write(text)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def choose_progress(progress: Progress | bool | None) -> Progress:
    """Return where a function of the Python interface reports its progress.

    Args:
        progress: The user's own receiver. None shows a bar in a notebook and nothing elsewhere,
            True shows a bar anywhere, False shows nothing.
    """
    if progress is None:
        progress = in_notebook()
    if isinstance(progress, bool):
        return BarProgress() if progress else Silent()
    return progress


def in_notebook() -> bool:
    """Return whether a notebook runs this process."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")
