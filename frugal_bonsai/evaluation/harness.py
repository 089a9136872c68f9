"""Tasks of lm-evaluation-harness: found, given their data, scored.

In: names of tasks, files of their items, a model of the harness. Out: the harness' own metrics.
Prompts, metrics and normalisation are the harness'. Items come from the hub as the harness reads
them, or from local JSON lines with the same columns. The harness is imported when tasks are loaded.
Holds the tasks' items.
"""

from __future__ import annotations

import difflib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any, cast
from unittest import mock

from frugal_bonsai.errors import OptionError
from frugal_bonsai.plain_json import parse_json
from frugal_bonsai.text.sources import hub_errors

# Resamples for the standard error of metrics that are no means, such as lambada's perplexity.
_RESAMPLES = 1000
# The harness draws few-shot examples with this seed.
_SEED = 1234
_GENERATES = "generate_until"
_SPLIT = "test"
# Columns of items that were prepared as the harness prepares them -> what the task then skips.
_PREPARED = {
    "hellaswag": (
        {"query", "choices", "gold"},
        {"process_docs": None, "doc_to_target": "gold"},
    )
}
_DATA_FORMS = "a folder that holds TASK.jsonl or TASK_*.jsonl for every task, or TASK=FILE"


def require_harness(option: str = "--tasks") -> None:
    """Check that lm-evaluation-harness is installed, without importing it.

    Args:
        option: Option that needs it, for the error text.

    Raises:
        OptionError: It is not.
    """
    if find_spec("lm_eval") is None:
        raise OptionError(
            f"{option} needs lm-evaluation-harness: run pip install 'frugal-bonsai[eval]', or "
            "pip install -e '.[eval]' in the clone"
        )


def split_names(tasks: str | Sequence[str] | None) -> list[str]:
    """Return the names of tasks, each once; a string has commas between them."""
    names = tasks.split(",") if isinstance(tasks, str) else tasks or ()
    return list(dict.fromkeys(name.strip() for name in names if name.strip()))


def find_task_data(names: Sequence[str], sources: Sequence[str]) -> dict[str, Path]:
    """Return the local file of each task that has one.

    Args:
        names: Tasks.
        sources: Values of ``--task-data``: ``TASK=FILE``, or folders, which must have a file for
            every task that no ``TASK=FILE`` names.

    Raises:
        OptionError: A source or a file is missing, ambiguous, no JSON lines or of an unknown task.
    """
    folders = [Path(source) for source in sources if Path(source).is_dir()]
    files: dict[str, Path] = {}
    for source in sources:
        if Path(source).is_dir():
            continue
        name, equals, path = source.partition("=")
        if not equals or not Path(path).is_file():
            raise OptionError(
                f"--task-data {source}: there is no such file or folder; use {_DATA_FORMS}"
            )
        if name not in names:
            raise OptionError(
                f"--task-data {source}: {name!r} is none of the tasks ({', '.join(names)})"
            )
        files[name] = Path(path)
    for name in names if folders else ():
        if name not in files:
            files[name] = _file_in(folders, name)
    for file in files.values():
        _first_item(file)
    return files


def _file_in(folders: Sequence[Path], name: str) -> Path:
    """Return the one file of a task in some folders."""
    patterns = [f"{name}.json*", f"{name}_*.json*"]
    for pattern in patterns:
        found = sorted(file for folder in folders for file in folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise OptionError(
                f"--task-data {found[0].parent}: has several files for task {name} "
                f"({', '.join(file.name for file in found)}); choose with --task-data {name}=FILE"
            )
    raise OptionError(
        f"--task-data {folders[0]}: has no file for task {name} (looked for {patterns[0]} and "
        f"{patterns[1]}); name it with --task-data {name}=FILE"
    )


def _first_item(file: Path) -> dict[str, Any]:
    """Return the first item of a file of JSON lines."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            item = parse_json(next(lines, ""))
    except (OSError, ValueError) as error:
        raise OptionError(
            f"--task-data {file}: its first line is not JSON ({error}); write one item a line"
        ) from error
    if not isinstance(item, dict):
        raise OptionError(f"--task-data {file}: expected an object a line, found {item!r:.80}")
    return item


def load_tasks(names: Sequence[str], files: Mapping[str, Path]) -> dict[str, Any]:
    """Load tasks with their items.

    Args:
        names: Tasks, groups or tags of the harness, or paths of its YAML files.
        files: Task -> local file of its items.

    Returns:
        What :func:`run_tasks` takes.

    Raises:
        OptionError: A name is unknown, a task needs the model to write text, or its items cannot be
            read.
    """
    manager = _find_tasks(names)
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
            known = f"; near it: {', '.join(near)}" if near else ""
            raise OptionError(f"lm-evaluation-harness has no task {name!r}{known}")
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        part = _load(manager, name, files.get(name))
        for key, found in loaded.items():
            found |= part.get(key, {})
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE == _GENERATES:
            raise OptionError(
                f"task {name} lets the model write text ({_GENERATES}), which is not supported; "
                "take tasks that are scored by log-likelihoods, such as multiple choice"
            )
    return loaded


def _find_tasks(names: Sequence[str]) -> Any:
    """Return the harness' index of tasks, of these alone where each has a file of its name.

    To index all of its tasks takes the harness several seconds.
    """
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    named = {name for name in names if not Path(name).is_file()}
    homes = {file.stem: file.parent for file in root.rglob("*.yaml") if file.stem in named}
    if homes.keys() == named:
        few = lm_eval.tasks.TaskManager(
            include_path=list(set(homes.values())), include_defaults=False
        )
        if named <= set(few.all_tasks):
            return few
    return lm_eval.tasks.TaskManager()


def _load(manager: Any, name: str, file: Path | None) -> Mapping[str, Any]:
    """Load one task, group or tag; ``file`` has the items of a task."""
    unreadable: tuple[type[Exception], ...] = (*hub_errors(), KeyError, TypeError, ImportError)
    try:
        with _quiet():
            if file is None:
                return cast("Mapping[str, Any]", manager.load([name]))
            # A group is the harness' way to change a task's settings.
            group = {"group": f"{name} of {file.name}", "task": [_local_task(name, file)]}
            return {"tasks": manager.load([group])["tasks"]}
    except unreadable as error:
        lines = str(error).strip().splitlines() or ["no details"]
        cause = f"({type(error).__name__}: {lines[0][:200]})"
        if file is None:
            raise OptionError(
                f"the items of task {name} could not be read {cause}; check the connection, or "
                f"name local items with --task-data: {_DATA_FORMS}"
            ) from error
        raise OptionError(
            f"--task-data {file}: the items of task {name} could not be read {cause}; each line "
            "must be an object with the columns of the task's data set on the hub, found "
            f"{', '.join(_first_item(file))}"
        ) from error


def _local_task(name: str, file: Path) -> dict[str, Any]:
    """Return the settings by which a task reads its items from a file."""
    columns, prepared = _PREPARED.get(name, (set(), {}))
    changes = prepared if columns and columns <= _first_item(file).keys() else {}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {_SPLIT: str(file)}},
        "training_split": None,
        "validation_split": None,
        "test_split": _SPLIT,
        "fewshot_split": _SPLIT,
        **changes,
    }


def run_tasks(
    model: Any, loaded: Mapping[str, Any], *, limit: int | None
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Score loaded tasks with a model of the harness.

    Args:
        model: The model.
        loaded: Tasks from :func:`load_tasks`; they can be scored once.
        limit: Number of items of each task. None takes all.

    Returns:
        Task or group -> its metrics, their standard errors (``"..._stderr"``; None where there is
        none) and the number of items; and task -> the harness' record of each item.
    """
    from lm_eval.evaluator import evaluate

    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
    # The harness forks a process for each core otherwise, to resample.
    with _quiet(), mock.patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}):
        results = evaluate(model, loaded, limit=limit, bootstrap_iters=_RESAMPLES)
    scores = {
        name: _metrics(found) | {"items": _items(results, name)}
        for name, found in results["results"].items()
    }
    return scores, results["samples"]


def _metrics(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a task by the names of their metrics; a filter none is not named."""
    return {
        key.removesuffix(",none"): float(value) if isinstance(value, Real) else None
        for key, value in found.items()
        if "," in key
    }


def _items(results: Mapping[str, Any], name: str) -> int:
    """Return the number of items that a task, or all tasks of a group, were scored on."""
    names = results["group_subtasks"].get(name, [name])
    if name in names:
        return int(results["n-samples"][name]["effective"])
    return sum(_items(results, inside) for inside in names)


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard what the harness prints, and its progress bars: the commands have their own."""
    from tqdm.std import tqdm

    begin = tqdm.__init__

    def hidden(bar: Any, *args: Any, **given: Any) -> None:
        begin(bar, *args, **{**given, "disable": True})

    with redirect_stdout(io.StringIO()), mock.patch.object(tqdm, "__init__", hidden):
        yield
