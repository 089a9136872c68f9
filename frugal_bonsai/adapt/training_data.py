"""What a student is trained and watched on: windows, and what the teacher says of them.

In: token windows, a teacher's cache. Out: micro-batches, the order of a pass. Holds the windows.

Shape suffixes: N windows, S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from frugal_bonsai.adapt.part import Part
from frugal_bonsai.adapt.teacher import TeacherCache


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What is trained and watched on.

    Attributes:
        windows_NS: int64, those to train on first, then the held-out ones.
        held_out: how many of them are held out.
        cache: the teacher's, of the same windows; None where the loss does not ask.
    """

    windows_NS: torch.Tensor
    held_out: int
    cache: TeacherCache | None = None

    @property
    def trained(self) -> int:
        """Windows to train on."""
        return len(self.windows_NS) - self.held_out

    def part(self, windows: list[int]) -> Part:
        """A micro-batch of these windows, by their numbers."""
        targets = None if self.cache is None else self.cache.read(windows)
        return Part(self.windows_NS[windows], targets)

    def order(self, number: int, seed: int) -> list[int]:
        """The windows' order in pass ``number``."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        return torch.randperm(self.trained, generator=generator).tolist()
