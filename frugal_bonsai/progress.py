"""The interface through which long-running work reports its progress.

The lower floors call a :class:`Progress`. The upper floors pass one that shows a live display,
prints lines, or does nothing.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receive the progress of a run."""

    def caps(self, host_bytes: int, gpu_bytes: int | None) -> None:
        """The memory caps are known; ``gpu_bytes`` is None without a GPU."""

    def round(self, number: int, rounds: int, sparsity: float) -> None:
        """Report that a pruning round begins; ``sparsity`` is the share removed so far."""

    def sweep(self, name: str, steps: int, tokens_per_step: int) -> None:
        """Report that a sweep begins: ``steps`` layer visits of ``tokens_per_step`` tokens.

        0 steps are an unknown number.
        """

    def step(self, detail: str = "") -> None:
        """Report that a layer visit is done."""

    def note(self, text: str) -> None:
        """Report a message for the user."""


class Silent:
    """Ignore all reports."""

    def caps(self, host_bytes: int, gpu_bytes: int | None) -> None:
        """Ignore."""

    def round(self, number: int, rounds: int, sparsity: float) -> None:
        """Ignore."""

    def sweep(self, name: str, steps: int, tokens_per_step: int) -> None:
        """Ignore."""

    def step(self, detail: str = "") -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""
