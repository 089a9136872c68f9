"""What long work tells whoever watches it.

The lower floors report through a :class:`Progress`; what is done with it (a live display, plain
lines, nothing) is decided above. Holds nothing.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of a run."""

    def round(self, number: int, rounds: int, sparsity: float) -> None:
        """A round of pruning begins; ``sparsity`` is the share removed so far."""

    def sweep(self, name: str, steps: int, tokens_per_step: int) -> None:
        """A sweep begins: ``steps`` layer visits, each over this many tokens."""

    def step(self, detail: str = "") -> None:
        """A layer visit is done."""

    def note(self, text: str) -> None:
        """Something that the user should read."""


class Silent:
    """Ignores everything."""

    def round(self, number: int, rounds: int, sparsity: float) -> None:
        """Ignore."""

    def sweep(self, name: str, steps: int, tokens_per_step: int) -> None:
        """Ignore."""

    def step(self, detail: str = "") -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""
