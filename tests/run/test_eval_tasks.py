"""``eval --tasks``: scores on tasks of lm-evaluation-harness, item by item those of its own model.

Skipped where the package ``lm-eval`` is missing, except for what is refused without it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import fail, succeed

import frugal_bonsai as package
from frugal_bonsai.errors import BudgetError, OptionError
from frugal_bonsai.evaluation import harness
from frugal_bonsai.memory.budget import parse_caps
from frugal_bonsai.progress import Silent
from frugal_bonsai.run.evaluate_tasks import evaluate_tasks
from frugal_bonsai.run.open import open_model

needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="the package lm-eval is not installed"
)
EXAMPLE = Path(package.__file__).parent / "example"
NAMES = ["lambada_openai", "arc_easy", "piqa", "hellaswag"]
_WORDS = "The function returns a list of all the files that the module has opened so far"
ITEMS: dict[str, list[dict[str, Any]]] = {
    "lambada_openai": [{"text": f"{_WORDS}, and then it closes the {w}"} for w in ("file", "door")],
    "arc_easy": [
        {
            "id": str(number),
            "question": f"{_WORDS * number}. What is it?",
            "choices": {"text": ["a list", "a file", "a module in Python", "x"], "label": labels},
            "answerKey": labels[number],
        }
        for number, labels in enumerate((["A", "B", "C", "D"], ["1", "2", "3", "4"]))
    ],
    "piqa": [
        {"goal": "open a file", "sol1": "call open()", "sol2": "call close() twice", "label": 0},
        {"goal": _WORDS, "sol1": "yes", "sol2": "no", "label": 1},
    ],
    "hellaswag": [
        {
            "query": f"Python: {_WORDS}",
            "choices": ["and stops.", "and begins again.", "or not.", "in the order of names."],
            "gold": gold,
        }
        for gold in (3, 0)
    ],
}
ROLLING = """
task: wiki_lines
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: {kind}
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: {metric}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of items for each task."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, items in ITEMS.items():
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (folder / f"{name}_some.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def rolling(data: Path) -> Path:
    """The file of a task that scores whole texts."""
    return _yaml(data, "loglikelihood_rolling", "bits_per_byte")


def _yaml(folder: Path, kind: str, metric: str) -> Path:
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{_WORDS} " * times}) + "\n" for times in (1, 7)),
        encoding="utf-8",
    )
    file = folder / f"{kind}.yaml"
    text = ROLLING.format(file=folder / "text.jsonl", kind=kind, metric=metric)
    file.write_text(text, encoding="utf-8")
    return file


def _load(names: Sequence[str], data: Path) -> Any:
    local = [name for name in names if not name.endswith(".yaml")]
    return harness.load_tasks(names, harness.find_task_data(local, [str(data)]))


@pytest.mark.parametrize("window", [None, 24], ids=["whole", "truncated"])
@needs_harness
def test_scores_are_those_of_the_harness_own_model(
    window: int | None, data: Path, rolling: Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    names = [*NAMES, str(rolling)]
    with open_model("example") as model:
        found, records = evaluate_tasks(
            model,
            _load(names, data),
            limit=None,
            window=window,
            weights=None,
            device=torch.device("cpu"),
            caps=parse_caps(None, None),
            progress=Silent(),
        )
    theirs = HFLM(
        pretrained=str(EXAMPLE), dtype="float32", device="cpu", batch_size=2, max_length=window
    )
    expected, their_records = harness.run_tasks(theirs, _load(names, data), limit=None)
    assert found["tasks"].keys() == {*NAMES, "wiki_lines"}
    for name, scores in expected.items():
        assert scores["items"] == 2 and found["tasks"][name].keys() == scores.keys()
        for metric, value in scores.items():
            assert found["tasks"][name][metric] == (value and pytest.approx(value, rel=1e-4))
        for record, theirs in zip(records[name], their_records[name], strict=True):
            assert record["arguments"] == theirs["arguments"]
            ours, others = record["filtered_resps"], theirs["filtered_resps"]
            assert torch.allclose(torch.tensor(ours), torch.tensor(others), rtol=1e-5, atol=1e-4)


@needs_harness
def test_commands_score_both_models_of_a_prune(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, names = tmp_path / "out", "piqa,hellaswag"
    words = ("--calibration", "stdlib", "--window", "64", "--windows", "4")
    words += ("--method", "fluctuation", "--layout", "per-layer", "--max-cpu-mem", "2GB")
    tasks = ("--eval-tasks", names, "--task-data", str(data), "--eval-limit", "1")
    summary = succeed("prune", "example", "--out", out, *words, *tasks)
    before, after = (summary[when]["tasks"] for when in ("before", "after"))
    assert before.keys() == after.keys() == {"piqa", "hellaswag"}
    for scores in (*before.values(), *after.values()):
        assert scores.keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "items"}
        assert scores["items"] == 1 and scores["acc"] in (0, 1)
    assert summary["memory"]["host_peak_bytes"] < summary["memory"]["host_cap_bytes"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"| piqa, acc_norm, 1 item | {before['piqa']['acc_norm']:.4f} |" in card

    text = ("--text", "stdlib", "--window", "64", "--windows", "2", "--max-cpu-mem", "2GB")
    found = succeed("eval", out, "--tasks", names, *tasks[2:4], "--limit", "1", *text)
    assert found["tasks"] == after and 0 < found["task_tokens"] < 200
    assert found["perplexity"] > 1 and found["window"] == 64
    assert found["host_peak_bytes"] < found["host_cap_bytes"]
    capfd.readouterr()
    options = package.EvalOptions(tasks=names, task_data=[str(data)], limit=1, weights="int8")
    dense = package.evaluate("example", options)
    assert dense["tasks"] == before
    assert "it/s" not in capfd.readouterr().err, "progress bars of the harness"


@needs_harness
def test_a_failure_at_the_end_costs_the_scores_and_not_the_prune(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise BudgetError("too small")

    monkeypatch.setattr("frugal_bonsai.run.prune_tasks.evaluate_tasks", fails)
    options = package.PruneOptions(
        method="fluctuation",
        calibration="stdlib",
        window=64,
        windows=4,
        eval_tasks=["piqa"],
        task_data=[str(data)],
    )
    summary = package.prune("example", tmp_path / "out", options)
    assert "no scores of tasks: too small" in summary["warnings"]
    assert "tasks" not in summary["before"] and (tmp_path / "out" / "model.safetensors").exists()


def test_without_the_package(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda _: None)
    assert "pip install 'frugal-bonsai[eval]'" in fail("eval", "example", "--tasks", "piqa")
    said = fail("prune", "example", "--out", data / "out", "--eval-tasks", "piqa")
    assert "--eval-tasks needs lm-evaluation-harness" in said
    said = fail("prune", "example", "--out", data / "out", "--eval-limit", "3")
    assert "--eval-limit is for --eval-tasks" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "eval needs --text SOURCE, --tasks NAME,... or both"),
        (("--text", "stdlib", "--limit", "2"), "--limit is for --tasks"),
        (("--tasks", "piqa", "--task-data", "missing"), "--task-data missing: there is no such"),
        (("--tasks", "piqa", "--task-data", "x=missing"), "TASK=FILE"),
        (("--tasks", "sciq", "--task-data", "{data}"), "looked for sciq.json* and sciq_*.json*"),
        (
            ("--tasks", "piqa", "--task-data", "sciq={data}/piqa_some.jsonl"),
            "'sciq' is none of the tasks (piqa)",
        ),
        (("--tasks", "piqa", "--task-data", "piqa={data}/bad.txt"), "first line is not JSON"),
    ],
)
def test_refused_options(words: tuple[str, ...], expected: str, data: Path) -> None:
    (data / "bad.txt").write_text("no JSON\n", encoding="utf-8")
    assert expected in fail("eval", "example", *(word.format(data=data) for word in words))


@needs_harness
def test_tasks_that_cannot_be_scored(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # to index all tasks takes the harness seconds
        index = SimpleNamespace(all_tasks=["hellaswag", "piqa"])
        patch.setattr("lm_eval.tasks.TaskManager", lambda: index)
        said = fail("eval", "example", "--tasks", "helaswag")
    assert "has no task 'helaswag'; near it: hellaswag" in said
    writes = _yaml(data, "generate_until", "exact_match")
    said = fail("eval", "example", "--tasks", writes)
    assert "wiki_lines lets the model write text (generate_until)" in said
    # Offline, items of the hub cannot be read.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    said = fail("eval", "example", "--tasks", "sciq")
    assert "the items of task sciq could not be read" in said and "--task-data" in said
    bad = data / "piqa_bad.jsonl"
    bad.write_text('{"goal": 1}\n{"goal"\n', encoding="utf-8")
    with pytest.raises(OptionError, match=r"piqa_bad\.jsonl: the items of task piqa could not"):
        harness.load_tasks(["piqa"], {"piqa": bad})
    bad.write_text('{"goal": "open", "sol1": "call open()"}\n', encoding="utf-8")
    with pytest.raises(OptionError, match="columns of the task's data set on the hub, found goal"):
        harness.load_tasks(["piqa"], {"piqa": bad})
    bad.unlink()
