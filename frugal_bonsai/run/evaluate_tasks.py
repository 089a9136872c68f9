"""Score a model on tasks of lm-evaluation-harness, streamed under the caps.

In: an open model, loaded tasks. Out: their scores as plain values. Each call of the harness, which
hands over all requests of a kind, is planned for its longest request and runs in batches of similar
lengths. Holds what a sweep holds, and the requests.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.accelerator import is_accelerator
from frugal_bonsai.errors import OptionError
from frugal_bonsai.evaluation.harness import run_tasks
from frugal_bonsai.evaluation.requests import (
    ENOUGH_GPU_TOKENS,
    ENOUGH_TOKENS,
    Batch,
    Request,
    make_batches,
    score_batch,
)
from frugal_bonsai.memory.budget import Budget, Caps, make_budget
from frugal_bonsai.memory.disk import RUN
from frugal_bonsai.memory.plan import MemoryPlan, SweepWorkload, plan_memory
from frugal_bonsai.progress import Progress
from frugal_bonsai.run.disk_room import require_room
from frugal_bonsai.run.engine import make_engine, measured_base_bytes
from frugal_bonsai.run.open import Model
from frugal_bonsai.run.plan import plan_items
from frugal_bonsai.run.summary import describe_peaks
from frugal_bonsai.run.weights import open_layers
from frugal_bonsai.stream.forward import Sweep
from frugal_bonsai.text.windows import load_tokenizer, require_embedded


def evaluate_tasks(
    model: Model,
    loaded: Mapping[str, Any],
    *,
    limit: int | None,
    window: int | None,
    weights: str | None,
    device: torch.device,
    caps: Caps,
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Score a model on loaded tasks.

    Args:
        model: The model.
        loaded: Tasks of :func:`frugal_bonsai.evaluation.harness.load_tasks`.
        limit: Number of items of each task. None takes all.
        window: Largest number of tokens that the model reads at a time. None takes its positions.
        weights: Working store, ``"int8"``. None streams the checkpoint.
        device: Device that computes.
        caps: Caps of the user.
        progress: Told of each layer visit.

    Returns:
        Plain values as ``eval --json`` prints them: ``"tasks"``, ``"task_tokens"``, memory, notes;
        and task -> the harness' record of each item.
    """
    from frugal_bonsai.evaluation.harness_model import StreamedModel

    tokenizer = load_tokenizer(model.folder)
    scorer = RequestScorer(model, tokenizer, weights, device, caps, progress)
    streamed = StreamedModel(tokenizer, window or model.spec.positions, scorer)
    scores, records = run_tasks(streamed, loaded, limit=limit)
    return {"tasks": scores, **scorer.describe()}, records


class RequestScorer:
    """Scores requests in as many sweeps as they need, within one memory plan for each batch.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        weights: Working store, ``"int8"``. None streams the checkpoint.
        device: Device that computes.
        caps: Caps of the user.
        progress: Told of each layer visit.

    Attributes:
        tokens: Tokens that the model has read, with padding.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        weights: str | None,
        device: torch.device,
        caps: Caps,
        progress: Progress,
    ) -> None:
        self._model, self._tokenizer, self._weights = model, tokenizer, weights
        self._device, self._caps, self._progress = device, caps, progress
        self._plans: list[MemoryPlan] = []
        self.tokens = 0

    def __call__(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Return log-likelihood and greedy match of each request."""
        if not requests:
            return []
        self._require_embedded(requests)
        enough = ENOUGH_GPU_TOKENS if is_accelerator(self._device) else ENOUGH_TOKENS
        batches = list(make_batches(requests, enough))
        budget = make_budget(self._device, self._caps)
        self._progress.caps(budget.host_bytes, budget.gpu_bytes)
        plans = self._plan(batches, budget)
        largest = max(plans, key=lambda plan: (plan.total_bytes("gpu"), plan.total_bytes("host")))
        require_room(largest.disk, {RUN: Path(tempfile.gettempdir())}, "the int8 working store")
        engine = make_engine(self._model, largest, self._device, self._progress)
        scores = [(0.0, False)] * len(requests)
        with open_layers(engine, self._weights) as stream:
            for place, (batch, plan) in enumerate(zip(batches, plans, strict=True), start=1):
                sweep = Sweep(engine.skeleton, plan.limits, progress=self._progress)
                name = f"log-likelihoods, batch {place} of {len(batches)}"
                for number, score in score_batch(
                    sweep, stream, engine.head, batch, requests, name=name
                ):
                    scores[number] = score
                self.tokens += sweep.forward_tokens
        self._plans.append(largest)
        return scores

    def describe(self) -> dict[str, Any]:
        """Return the caps, predicted and measured memory of all calls as plain values.

        Raises:
            OptionError: No request was scored.
        """
        if not self._plans:
            raise OptionError("tasks: no item has a token to score; look at the items")
        largest = max(self._plans, key=lambda plan: plan.total_bytes("host"))
        return {
            "task_tokens": self.tokens,
            **describe_peaks(self._plans, self._device),
            "plan": plan_items(largest),
            "notes": [*largest.budget.notes, *self._model.notes],
        }

    def _plan(self, batches: Sequence[Batch], budget: Budget) -> list[MemoryPlan]:
        """Plan the memory of each batch."""
        spec, base_bytes = self._model.spec, measured_base_bytes(self._model.spec, first=False)
        works = (
            SweepWorkload(window=batch.window, measured=(len(batch.inputs),), weights=self._weights)
            for batch in batches
        )
        return [plan_memory(spec, budget, work, base_bytes=base_bytes) for work in works]

    def _require_embedded(self, requests: Sequence[Request]) -> None:
        """Check that the model has an embedding row for every token."""
        for request in requests:
            if max(request.tokens) >= self._model.spec.vocabulary:
                require_embedded(
                    torch.tensor(request.tokens),
                    self._tokenizer,
                    self._model.spec.vocabulary,
                    what="tasks: an item",
                )
