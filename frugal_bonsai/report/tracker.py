"""The progress of a run in figures: round, sweep, rate, time left, memory against the caps.

In: the calls of a :class:`~frugal_bonsai.progress.Progress`. Out: short texts for both displays.
Holds a few numbers. The thread of the live display reads them while the run writes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from frugal_bonsai.memory.meter import reserved_gpu_bytes, resident_bytes
from frugal_bonsai.report.words import duration
from frugal_bonsai.sizes import GIB

Clock = Callable[[], float]

# Seconds between two readings of the memory in use.
_METER_SECONDS = 0.5


@dataclass(frozen=True)
class _Round:
    """Position of the run. Replaced as a whole, because the display reads from another thread."""

    number: int
    rounds: int
    sparsity: float
    began: float


@dataclass(frozen=True)
class _Sweep:
    """Position of the sweep, likewise."""

    name: str
    steps: int
    tokens: int
    began: float
    done: int = 0
    stepped: float = 0.0
    unit: str = ""


class Tracker:
    """Figures of a run that both displays show.

    Args:
        clock: Seconds that never go backwards.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._caps: tuple[int | None, int | None] = (None, None)
        self._memory, self._gpu_memory, self._read_at = 0, 0, -float("inf")
        self._first: _Round | None = None
        self._round: _Round | None = None
        self._sweep: _Sweep | None = None

    def caps(self, host_bytes: int, gpu_bytes: int | None) -> None:
        """Take the caps on resident and on device memory."""
        self._caps = (host_bytes, gpu_bytes)

    def round(self, number: int, rounds: int, sparsity: float) -> None:
        """Begin a round."""
        self._round = _Round(number, rounds, sparsity, self._clock())
        self._first = self._first or self._round

    def sweep(self, name: str, steps: int, tokens: int) -> None:
        """Begin a sweep whose steps take ``tokens`` tokens each; 0 steps are an unknown number."""
        self._sweep = _Sweep(name, steps, tokens, self._clock())

    def step(self, detail: str = "") -> None:
        """Count a step; ``detail``, such as "layer 3", names the steps."""
        now = self._sweep
        if now is None:
            return
        unit = f" {detail.split()[0]}s" if detail.split() else now.unit
        self._sweep = _Sweep(
            now.name, now.steps, now.tokens, now.began, now.done + 1, self._clock(), unit
        )

    @property
    def finished(self) -> bool:
        """True if all steps of the sweep are done."""
        return self._sweep is not None and 0 < self._sweep.done == self._sweep.steps

    @property
    def round_share(self) -> float | None:
        """Share of the rounds that are done. None before the first."""
        now = self._round
        return None if now is None else (now.number - 1) / max(now.rounds, 1)

    @property
    def sweep_share(self) -> float:
        """Share of the sweep that is done."""
        now = self._sweep
        return 0.0 if now is None or not now.steps else min(now.done / now.steps, 1.0)

    def round_text(self) -> str:
        """Return ``round 3 of 10, 10.0% removed``; empty before the first."""
        now = self._round
        if now is None:
            return ""
        return f"round {now.number} of {now.rounds}, {now.sparsity:.1%} removed"

    def run_left_text(self) -> str:
        """Return ``about 12 min of rounds left``; empty until a round has finished."""
        first, now = self._first, self._round
        if first is None or now is None or now.number <= first.number:
            return ""
        each = (now.began - first.began) / (now.number - first.number)
        ahead = each * (now.rounds - now.number + 1) - (self._clock() - now.began)
        return f"about {duration(ahead)} of rounds left"

    def sweep_name(self) -> str:
        """Return the name of the sweep."""
        return "" if self._sweep is None else self._sweep.name

    def sweep_text(self) -> str:
        """Return ``3 of 32 layers, 5,000 tokens/s, 12 s left``; at its end ``in 14 s``."""
        now = self._sweep
        if now is None:
            return ""
        # A number of steps estimated from the clock can be too small, or 0 at first.
        more = now.done > now.steps
        parts = [f"{now.done}{now.unit}" if more else f"{now.done} of {now.steps}{now.unit}"]
        spent = now.stepped - now.began
        if now.done and spent > 0 and now.tokens:
            # All tokens pass all steps, so a step is the share of one layer.
            parts.append(f"{now.tokens * now.done / max(now.steps, 1) / spent:,.0f} tokens/s")
        if self.finished:
            parts.append(f"in {duration(spent)}")
        elif now.done and not more:
            ahead = spent / now.done * (now.steps - now.done)
            parts.append(f"{duration(ahead - (self._clock() - now.stepped))} left")
        return ", ".join(parts)

    def memory_text(self) -> str:
        """Return ``memory 0.53 of 2.00 GiB``, with ``, GPU 3.20 of 24.00 GiB`` on a GPU."""
        now, (cap, gpu_cap) = self._clock(), self._caps
        if now - self._read_at >= _METER_SECONDS:
            self._memory, self._read_at = resident_bytes(), now
            self._gpu_memory = 0 if gpu_cap is None else reserved_gpu_bytes()
        of_cap = "" if cap is None else f" of {cap / GIB:.2f}"
        text = f"memory {self._memory / GIB:.2f}{of_cap} GiB"
        if gpu_cap is not None:
            text += f", GPU {self._gpu_memory / GIB:.2f} of {gpu_cap / GIB:.2f} GiB"
        return text
