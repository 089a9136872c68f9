"""Scores on tasks before and after a prune.

In: the options of a prune, its models. Out: scores as plain values. Both models are scored at the
end, so that the search has the memory; a failure costs the scores and not the prune. Holds what
:mod:`frugal_bonsai.run.evaluate_tasks` holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frugal_bonsai.errors import FrugalBonsaiError
from frugal_bonsai.evaluation.harness import find_task_data, load_tasks, split_names
from frugal_bonsai.run.evaluate_tasks import evaluate_tasks
from frugal_bonsai.run.open import Model, open_output
from frugal_bonsai.run.options import PruneOptions
from frugal_bonsai.run.prepare import PruneRun


def check_tasks(options: PruneOptions) -> None:
    """Load the tasks of ``--eval-tasks``, so that what is missing is found before the search.

    Raises:
        OptionError: A task is unknown, needs the model to write text, or its items cannot be read.
    """
    if split_names(options.eval_tasks):
        _load(options)


def add_task_scores(
    summary: dict[str, Any], run: PruneRun, options: PruneOptions, pruned: Path
) -> None:
    """Score both models on the tasks of ``--eval-tasks``, and write the scores into a summary.

    Args:
        summary: The summary; ``"before"`` and ``"after"`` get ``"tasks"``. A failure becomes one of
            its warnings.
        run: The prune.
        options: Its options.
        pruned: Folder of the pruned model.
    """
    if not split_names(options.eval_tasks):
        return
    try:
        before = _score(run.model, run, options)
        with open_output(pruned, run.model) as output:
            after = _score(output, run, options)
    except FrugalBonsaiError as error:
        warning = f"no scores of tasks: {error}"
        run.engine.progress.note(warning)
        summary["warnings"].append(warning)
        return
    summary["before"]["tasks"], summary["after"]["tasks"] = before, after


def _load(options: PruneOptions) -> dict[str, Any]:
    names = split_names(options.eval_tasks)
    return load_tasks(names, find_task_data(names, options.task_data))


def _score(model: Model, run: PruneRun, options: PruneOptions) -> dict[str, Any]:
    """Return the scores of a model on freshly loaded tasks."""
    values, _ = evaluate_tasks(
        model,
        _load(options),
        limit=options.eval_limit,
        window=None,
        weights=None,
        device=run.engine.device,
        caps=options.caps,
        progress=run.engine.progress,
    )
    scores: dict[str, Any] = values["tasks"]
    return scores
