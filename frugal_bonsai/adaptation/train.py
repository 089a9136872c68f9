"""Train a student, measure the held-out perplexity on the way, keep the best parameters.

In: a student, its trained parameters, windows, and the teacher's answers. Out: the parameters of
the best held-out perplexity, in the student and in the run directory, and a report. The loss of a
step is the mean over its tokens, for any number of micro-batches. A loss or gradient that is not
finite ends the training before any parameter changes. Holds the optimiser's two moments and the
tokens of a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from frugal_bonsai.adaptation.objective import Sums
from frugal_bonsai.adaptation.optimiser import make_optimiser
from frugal_bonsai.adaptation.schedule import Schedule
from frugal_bonsai.adaptation.settings import AdaptSettings, Objective
from frugal_bonsai.adaptation.state import TrainingFolder, TrainingState
from frugal_bonsai.adaptation.student import Student
from frugal_bonsai.adaptation.training_data import MicroBatch, TrainingData
from frugal_bonsai.errors import BudgetError, CheckpointError
from frugal_bonsai.memory.training_items import ADAMW
from frugal_bonsai.progress import Progress
from frugal_bonsai.stream.micro_batch import is_out_of_memory


@dataclass(kw_only=True)
class Trained(TrainingState):
    """State of a training that has ended; the parameters of its best step are in the student.

    Attributes:
        tokens: number of tokens trained on.
        earlier_seconds: part of the time that was spent before this resume.
        stopped: why the training ended early, or None.
    """

    tokens: int
    earlier_seconds: float
    stopped: str | None

    @property
    def before(self) -> dict[str, Any]:
        """Held-out measurement of the untrained model."""
        return self.history[0]

    @property
    def after(self) -> dict[str, Any]:
        """Held-out measurement of the best step."""
        return next(row for row in self.history if row["step"] == self.best_step)


class Trainer:
    """Trains one student.

    Args:
        student: its weights are loaded.
        parameters: trained parameters by name.
        data: windows and the teacher's answers.
        settings: resolved settings.
        objective: the loss.
        micro_batch: number of windows that are computed together.
        together: number of micro-batches that pass a layer one after the other; with streamed
            layers all of a step.
        optimiser: ``"adamw"`` or ``"adamw8bit"``.
        folder: saves state and best parameters.
        progress: gets each step and measurement.
        clock: returns seconds; never goes backwards.
    """

    def __init__(
        self,
        student: Student,
        parameters: Mapping[str, nn.Parameter],
        data: TrainingData,
        settings: AdaptSettings,
        objective: Objective,
        *,
        micro_batch: int,
        together: int = 1,
        optimiser: str = ADAMW,
        folder: TrainingFolder,
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._student, self._parameters, self._data = student, dict(parameters), data
        self._settings, self._objective = settings, objective
        self._micro_batch, self._together = micro_batch, together
        self._folder, self._progress = folder, progress
        self._optimiser = make_optimiser(
            optimiser, self._parameters.values(), rate=settings.rate(1.0)
        )
        self._batch = min(settings.batch, data.trained)
        self._step_tokens = self._batch * data.windows_NS.shape[1]
        self._schedule = Schedule(
            settings,
            step_tokens=self._step_tokens,
            pass_steps=data.trained / self._batch,
            clock=clock,
        )
        self._state, self._recent = TrainingState(), Sums()
        self._stopped: str | None = None
        self._earlier_seconds = 0.0

    def run(self, *, resume: bool = False) -> Trained:
        """Train to the end, then load the best parameters.

        Raises:
            StateError: the saved state is damaged or of another run.
            CheckpointError: the untrained model's loss is not finite.
            BudgetError: memory ran out with one window in a micro-batch.
        """
        if resume:
            self._state = self._folder.load(self._parameters, self._optimiser)
            self._earlier_seconds = self._state.seconds
        self._schedule.start(self._state.seconds)
        if not resume:
            self._measure()
        measured = self._measurements_due()
        self._begin_sweep()
        while not self._is_over():
            self._step()
            self._progress.step("step")
            if self._stopped is None and (self._measurements_due() > measured or self._is_over()):
                measured = self._measurements_due()
                self._measure()
                if not self._is_over():
                    self._begin_sweep()
        return self._finish()

    def _is_over(self) -> bool:
        return self._stopped is not None or self._schedule.share(self._state.step) >= 1.0

    def _measurements_due(self) -> int:
        return self._schedule.measurements_due(self._state.step)

    # -- a step ----------------------------------------------------------------------------------
    def _step(self) -> None:
        """Take one step, unless the loss or the gradient is not finite."""
        sums = self._within_memory(self._gradients)
        loss = sums.loss(self._objective)
        norm = float(nn.utils.clip_grad_norm_(list(self._parameters.values()), self._settings.clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm}"
            step = self._state.step + 1
            self._stopped = f"step {step}: the {what}; a lower --learning-rate may help"
            self._progress.note(f"stopped at {self._stopped}; the best step so far is kept")
            return
        rate = self._settings.rate(self._schedule.share(self._state.step, ahead=0.5))
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        self._state.step += 1
        self._recent.add(sums)

    def _gradients(self) -> Sums:
        """Compute the gradients of a step; those of an attempt that failed are dropped first."""
        self._optimiser.zero_grad(set_to_none=True)
        windows, sums = self._windows_of(self._state.step), Sums()
        scale = 1.0 / (len(windows) * (self._data.windows_NS.shape[1] - 1))
        for batches in self._groups(windows):
            sums.add(self._student.gradients(batches, self._objective, scale=scale))
        return sums

    def _within_memory(self, work: Callable[[], Sums]) -> Sums:
        """Do some work; if memory runs out, start it again with half the micro-batch.

        Raises:
            BudgetError: memory ran out with one window.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self._micro_batch == 1:
                    first = str(error).partition("\n")[0]
                    raise BudgetError(
                        f"memory ran out with one window in a micro-batch ({first}); close other "
                        f"programs, lower --max-gpu-mem or --max-cpu-mem below what is free, or "
                        f"use a shorter --window"
                    ) from error
            # Outside the except block, because the error holds the frames and their activations.
            self._micro_batch //= 2
            self._together *= 2 if self._together > 1 else 1
            self._progress.note(
                f"memory ran out in a micro-batch; going on with {self._micro_batch} windows"
            )

    def _groups(self, windows: list[int]) -> Iterator[list[MicroBatch]]:
        """Yield groups of micro-batches that pass a layer one after the other."""
        size = self._micro_batch
        batches = [windows[at : at + size] for at in range(0, len(windows), size)]
        for at in range(0, len(batches), self._together):
            yield [self._data.batch(batch) for batch in batches[at : at + self._together]]

    def _windows_of(self, step: int) -> list[int]:
        """Return the windows of a step: each pass takes every window once, in its own order."""
        data, chosen, first = self._data, list[int](), step * self._batch
        while len(chosen) < self._batch:
            number, place = divmod(first + len(chosen), data.trained)
            order = data.order(number, self._settings.seed)
            chosen += order[place : place + self._batch - len(chosen)]
        return chosen

    # -- measurements ----------------------------------------------------------------------------
    def _measure(self) -> None:
        """Measure the held-out windows, save the state, and the parameters if they are the best.

        Raises:
            CheckpointError: the untrained model's loss is not finite.
        """
        state, measured = self._state, self.measure_held_out()
        perplexity = measured["perplexity"]
        if not math.isfinite(perplexity):
            if state.best_perplexity is None:
                raise CheckpointError(
                    f"{self._student.checkpoint.folder}: the held-out loss of the pruned model is "
                    f"not finite; was it pruned and saved completely?"
                )
            self._stopped = f"step {state.step}: the held-out perplexity is {perplexity}"
            return
        loss = self._recent.loss(self._objective) if self._recent.tokens else None
        state.seconds = self._schedule.seconds
        state.history.append({"step": state.step, "loss": loss, **measured})
        if state.best_perplexity is None or perplexity < state.best_perplexity:
            state.best_perplexity, state.best_step = perplexity, state.step
            self._folder.save_best(self._parameters)
        self._folder.save(state, self._parameters, self._optimiser)
        self._report(loss, perplexity)
        self._recent = Sums()

    def measure_held_out(self) -> dict[str, Any]:
        """Return perplexity and both bounds of the divergence from the teacher, in nats a token."""
        data = self._data
        windows = list(range(data.trained, len(data.windows_NS)))

        def measure() -> Sums:
            total = Sums()
            for batches in self._groups(windows):
                total.add(self._student.measure(batches, self._objective))
            return total

        total = self._within_memory(measure)
        nll, taught = total.lm / total.tokens, data.cache is not None
        return {
            "perplexity": math.exp(nll) if nll < 700 else math.inf,
            "kl": total.kl / total.tokens if taught else None,
            "kl_upper": total.kl_upper / total.tokens if taught else None,
        }

    def _report(self, loss: float | None, perplexity: float) -> None:
        """Note share, loss, perplexity, speed and time left."""
        state, share = self._state, self._schedule.share(self._state.step)
        parts = [f"{share:.0%} of the training"]
        if loss is not None:
            parts.append(f"loss {loss:.3f}")
        parts.append(f"held-out perplexity {perplexity:.3f} (best {state.best_perplexity:.3f})")
        if state.step and share < 1.0:
            parts.append(f"{state.step * self._step_tokens / state.seconds:,.0f} tokens/s")
            parts.append(f"about {state.seconds * (1 - share) / share / 60:.1f} min left")
        self._progress.note(", ".join(parts))

    def _begin_sweep(self) -> None:
        """Announce the steps to the next measurement."""
        steps, best = self._schedule.steps_to_next(self._state.step), self._state.best_perplexity
        name = "adapting" if best is None else f"adapting, best held-out perplexity {best:.2f}"
        self._progress.sweep(name, steps, steps * self._step_tokens)

    def _finish(self) -> Trained:
        self._folder.load_best(self._parameters)
        self._state.seconds = self._schedule.seconds
        return Trained(
            **vars(self._state),
            tokens=self._state.step * self._step_tokens,
            earlier_seconds=self._earlier_seconds,
            stopped=self._stopped,
        )
