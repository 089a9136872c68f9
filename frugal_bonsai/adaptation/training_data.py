"""Token windows to train on, held-out windows, and the teacher's answers for both.

In: token windows and a teacher's cache. Out: micro-batches, and the order of the windows in each
pass. Holds the windows; the answers stay on disk.

Shape suffixes: N windows, B windows of a micro-batch, S tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from frugal_bonsai.adaptation.teacher_cache import Targets, TeacherCache


@dataclass(frozen=True)
class MicroBatch:
    """Windows that are computed together.

    Attributes:
        tokens_BS: int64.
        targets: the teacher's answers, on the CPU; None if the loss needs no teacher.
    """

    tokens_BS: torch.Tensor
    targets: Targets | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Windows to train on and to hold out.

    Attributes:
        windows_NS: int64; the held-out windows come last.
        held_out: number of held-out windows.
        cache: the teacher's answers for these windows; None if the loss needs no teacher.
    """

    windows_NS: torch.Tensor
    held_out: int
    cache: TeacherCache | None = None

    @property
    def trained(self) -> int:
        """Number of windows to train on."""
        return len(self.windows_NS) - self.held_out

    @property
    def held_out_NS(self) -> torch.Tensor:
        """The held-out windows."""
        return self.windows_NS[self.trained :]

    def batch(self, windows: list[int]) -> MicroBatch:
        """Return a micro-batch of the windows with these numbers."""
        targets = None if self.cache is None else self.cache.read(windows)
        return MicroBatch(self.windows_NS[windows], targets)

    def order(self, number: int, seed: int) -> list[int]:
        """Return the order of the training windows in pass ``number``."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        return torch.randperm(self.trained, generator=generator).tolist()
