"""The progress of a training, counted in steps or by the clock.

In: settings and the number of finished steps. Out: the share of the training that is done, and when
the next held-out measurement is due. Holds no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from frugal_bonsai.adaptation.settings import DEFAULT_PASSES, AdaptSettings


class Schedule:
    """Tells how much of a training is done; :meth:`start` comes first.

    Args:
        settings: name tokens, seconds or neither.
        step_tokens: number of tokens of a step.
        pass_steps: number of steps of a pass over the windows.
        clock: returns seconds; never goes backwards.
    """

    def __init__(
        self,
        settings: AdaptSettings,
        *,
        step_tokens: int,
        pass_steps: float,
        clock: Callable[[], float],
    ) -> None:
        self._evaluations, self._clock, self._began = settings.evaluations, clock, 0.0
        self._limit_seconds = settings.seconds
        steps = DEFAULT_PASSES * pass_steps
        if settings.tokens is not None:
            steps = math.ceil(settings.tokens / step_tokens)
        self._steps = max(1, int(steps))

    def start(self, spent_seconds: float) -> None:
        """Start the clock, for a training that has already taken some time."""
        self._began = self._clock() - spent_seconds

    @property
    def seconds(self) -> float:
        """Time spent."""
        return self._clock() - self._began

    def share(self, step: int, *, ahead: float = 0.0) -> float:
        """Return the share of the training that is done, or will be after ``ahead`` more steps."""
        if self._limit_seconds is None:
            return (step + ahead) / self._steps
        spent = self.seconds
        each = spent / step if step else 0.0
        return min(1.0, (spent + ahead * each) / self._limit_seconds)

    def measurements_due(self, step: int) -> int:
        """Return the number of held-out measurements that are due after this many steps."""
        return int(self.share(step) * self._evaluations)

    def steps_to_next(self, step: int) -> int:
        """Return the number of steps to the next measurement.

        By the clock it is an estimate, and 0 (unknown) before the first step.
        """
        if self._limit_seconds is None:
            until = math.ceil((self.measurements_due(step) + 1) * self._steps / self._evaluations)
            return max(1, min(until, self._steps) - step)
        if not step:
            return 0
        between = self._limit_seconds / self._evaluations
        return max(1, round(between / max(self.seconds / step, 1e-9)))
