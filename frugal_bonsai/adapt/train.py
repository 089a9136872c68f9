"""Training a student: steps over windows, a held-out perplexity that is watched, the best kept.

In: a student, what is trained, windows, what the teacher says of them. Out: parameters of the best
held-out perplexity in place, and a report. The optimiser is optimiser.py's; its rate rises, then
falls by half a cosine. The loss of a step is the mean over its tokens, however
many micro-batches it takes. A loss or gradient that is not finite ends the training before it
changes anything. Holds the optimiser's two moments and a step's tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from frugal_bonsai.adapt.objective import Objective
from frugal_bonsai.adapt.optimiser import make_optimiser
from frugal_bonsai.adapt.part import Part, Sums
from frugal_bonsai.adapt.settings import AdaptSettings
from frugal_bonsai.adapt.state import TrainingFolder, TrainingState
from frugal_bonsai.adapt.student import Student
from frugal_bonsai.adapt.training_data import Lessons
from frugal_bonsai.errors import BudgetError, CheckpointError
from frugal_bonsai.memory.training_items import ADAMW
from frugal_bonsai.progress import Progress
from frugal_bonsai.stream.micro_batch import is_out_of_memory


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How a training went.

    Attributes:
        steps: done.
        tokens: trained on.
        seconds: spent, held-out measurements included.
        best_step: whose parameters are in place now; 0 is the pruned model as it came.
        before: held-out measurement of the pruned model.
        after: the same of the best step.
        history: all measurements.
        stopped: why it ended early, or None.
    """

    steps: int
    tokens: int
    seconds: float
    best_step: int
    before: dict[str, Any]
    after: dict[str, Any]
    history: list[dict[str, Any]]
    stopped: str | None


class Trainer:
    """Trains one student.

    Args:
        student: whose weights and adapters are in place.
        parameters: what is trained, by name.
        lessons: windows and teacher.
        settings: how.
        objective: the loss.
        micro_batch: windows computed together.
        together: micro-batches that pass a layer one after the other (streamed layers: a step's).
        optimiser: ``"adamw"`` or ``"adamw8bit"``, whatever the settings leave open.
        folder: keeps state and best parameters.
        progress: told of each step.
        clock: seconds, never backwards.
    """

    def __init__(
        self,
        student: Student,
        parameters: Mapping[str, nn.Parameter],
        lessons: Lessons,
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
        settings = settings.for_width(student.spec.hidden)
        self._student, self._parameters, self._lessons = student, dict(parameters), lessons
        self._settings, self._objective = settings, objective
        self._micro_batch, self._together = micro_batch, together
        self._streamed = together > 1
        self._folder, self._progress, self._clock = folder, progress, clock
        self._optimiser = make_optimiser(
            optimiser, self._parameters.values(), rate=settings.rate(1.0)
        )
        self._batch = min(settings.batch, lessons.trained)
        self._step_tokens = self._batch * lessons.windows_NS.shape[1]
        self._steps = None if settings.seconds is not None else self._planned_steps()
        self._state = TrainingState()
        self._began = 0.0
        self._stopped: str | None = None
        self._recent = Sums()

    def _planned_steps(self) -> int:
        if self._settings.tokens is not None:
            return max(1, math.ceil(self._settings.tokens / self._step_tokens))
        from frugal_bonsai.adapt.settings import DEFAULT_PASSES

        return max(1, DEFAULT_PASSES * self._lessons.trained // self._batch)

    def run(self, *, resume: bool = False) -> Trained:
        """Train to the end, then put the best parameters in place.

        Raises:
            StateError: there is nothing to resume, or of another run.
            CheckpointError: the pruned model's own loss is no finite number.
        """
        if resume:
            self._state = self._folder.load(self._parameters, self._optimiser)
        self._began = self._clock() - self._state.seconds
        if not resume:
            self._watch()
        watched = self._due()
        self._begin_sweep()
        while self._share() < 1.0 and self._stopped is None:
            self._step()
            self._progress.step("step")
            if self._stopped is None and (self._due() > watched or self._share() >= 1.0):
                watched = self._due()
                self._watch()
                if self._share() < 1.0:
                    self._begin_sweep()
        return self._finish()

    # -- a step ----------------------------------------------------------------------------------
    def _step(self) -> None:
        """One batch: gradients, rate, update; nothing changes where a number is not finite."""
        state = self._state
        windows = self._windows_of(state.step)
        scale = 1.0 / (len(windows) * (self._lessons.windows_NS.shape[1] - 1))

        def gradients() -> Sums:
            self._optimiser.zero_grad(set_to_none=True)  # of a try that ran out of memory too
            sums = Sums()
            for parts in self._groups(windows):
                sums.add(self._student.gradients(parts, self._objective, scale=scale))
            return sums

        sums = self._within_memory(gradients)
        loss = sums.loss(self._objective)
        norm = float(nn.utils.clip_grad_norm_(list(self._parameters.values()), self._settings.clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm}"
            self._stopped = f"step {state.step + 1}: the {what}; a lower --learning-rate may help"
            self._progress.note(f"stopped at {self._stopped}; the best step so far is kept")
            return
        rate = self._settings.rate(self._share(ahead=0.5))
        for group_ in self._optimiser.param_groups:
            group_["lr"] = rate
        self._optimiser.step()
        state.step += 1
        self._recent.add(sums)

    def _within_memory(self, work: Callable[[], Sums]) -> Sums:
        """Do the work; where memory runs out, all of it again with half the micro-batch.

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
                        f"programs, lower --max-gpu-mem or --max-cpu-mem below what is really "
                        f"free, or use a shorter --window"
                    ) from error
            # Outside the except block: the error holds the frames, and these the activations.
            self._micro_batch //= 2
            self._together *= 2 if self._streamed else 1
            self._progress.note(
                f"memory ran out in a micro-batch; going on with {self._micro_batch} windows"
            )

    def _groups(self, windows: list[int]) -> Iterator[list[Part]]:
        """Micro-batches that pass a layer one after the other."""
        size = self._micro_batch
        parts = [windows[at : at + size] for at in range(0, len(windows), size)]
        for at in range(0, len(parts), self._together):
            yield [self._lessons.part(part) for part in parts[at : at + self._together]]

    def _windows_of(self, step: int) -> list[int]:
        """The windows of a step: pass after pass, each in an order of its own."""
        lessons, seed, chosen = self._lessons, self._settings.seed, list[int]()
        at = step * self._batch
        while len(chosen) < self._batch:
            number, place = divmod(at + len(chosen), lessons.trained)
            order = lessons.order(number, seed)
            chosen += order[place : place + self._batch - len(chosen)]
        return chosen

    def _share(self, *, ahead: float = 0.0) -> float:
        """How much of the training is done, or will be after ``ahead`` more steps."""
        if self._steps is not None:
            return (self._state.step + ahead) / self._steps
        assert self._settings.seconds is not None
        spent = self._clock() - self._began
        each = spent / self._state.step if self._state.step else 0.0
        return min(1.0, (spent + ahead * each) / self._settings.seconds)

    def _due(self) -> int:
        """How many measurements are due at this share of the training."""
        return int(self._share() * self._settings.evaluations)

    # -- watching --------------------------------------------------------------------------------
    def _watch(self) -> None:
        """Measure the held-out windows, keep what is best, save the state."""
        state, measured = self._state, self.measure_held_out()
        perplexity = measured["perplexity"]
        if not math.isfinite(perplexity):
            if state.best_perplexity is None:
                raise CheckpointError(
                    f"{self._student.checkpoint.folder}: the held-out loss of the pruned model is "
                    f"no finite number; was it pruned and saved whole?"
                )
            self._stopped = f"step {state.step}: the held-out perplexity is {perplexity}"
            return
        loss = self._recent.loss(self._objective) if self._recent.tokens else None
        state.seconds = self._clock() - self._began
        state.history.append({"step": state.step, "loss": loss, **measured})
        if state.best_perplexity is None or perplexity < state.best_perplexity:
            state.best_perplexity, state.best_step = perplexity, state.step
            self._folder.save_best(self._parameters)
        self._folder.save(state, self._parameters, self._optimiser)
        self._say(loss, perplexity)
        self._recent = Sums()

    def measure_held_out(self) -> dict[str, Any]:
        """Perplexity, and the divergence from the teacher between its bounds, in nats a token."""
        lessons = self._lessons
        windows = list(range(lessons.trained, len(lessons.windows_NS)))

        def measure() -> Sums:
            total = Sums()
            for parts in self._groups(windows):
                total.add(self._student.measure(parts, self._objective))
            return total

        total = self._within_memory(measure)
        nll = total.lm / total.tokens
        asked = lessons.cache is not None
        return {
            "perplexity": math.exp(nll) if nll < 700 else math.inf,
            "kl": total.kl / total.tokens if asked else None,
            "kl_upper": total.kl_upper / total.tokens if asked else None,
        }

    def _say(self, loss: float | None, perplexity: float) -> None:
        from_best = f" (best {self._state.best_perplexity:.3f})"
        said = [f"{self._share():.0%} of the training"]
        if loss is not None:
            said.append(f"loss {loss:.3f}")
        said.append(f"held-out perplexity {perplexity:.3f}{from_best}")
        spent, share = self._state.seconds, self._share()
        if self._state.step and share < 1.0:
            said.append(f"{self._state.step * self._step_tokens / spent:,.0f} tokens/s")
            said.append(f"about {spent * (1 - share) / share / 60:.1f} min left")
        self._progress.note(", ".join(said))

    def _begin_sweep(self) -> None:
        """The steps to the next measurement, for the progress."""
        evaluations = self._settings.evaluations
        if self._steps is not None:
            until = math.ceil((self._due() + 1) * self._steps / evaluations)
            steps = max(1, min(until, self._steps) - self._state.step)
        else:
            spent, seconds = self._clock() - self._began, self._settings.seconds or 1.0
            each = spent / self._state.step if self._state.step else seconds / evaluations
            steps = max(1, round(seconds / evaluations / max(each, 1e-9)))
        best = self._state.best_perplexity
        name = "adapting" if best is None else f"adapting, best held-out perplexity {best:.2f}"
        self._progress.sweep(name, steps, steps * self._step_tokens)

    def _finish(self) -> Trained:
        state = self._state
        self._folder.load_best(self._parameters)
        by_step = {row["step"]: row for row in state.history}
        return Trained(
            steps=state.step,
            tokens=state.step * self._step_tokens,
            seconds=self._clock() - self._began,
            best_step=state.best_step,
            before=state.history[0],
            after=by_step[state.best_step],
            history=state.history,
            stopped=self._stopped,
        )
