"""The Python interface has the names of the command line, and a bar in notebooks."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import frugal_bonsai
from frugal_bonsai.cli import cli
from frugal_bonsai.errors import OptionError
from frugal_bonsai.progress import Silent
from frugal_bonsai.report.bar import BarProgress, choose_progress
from frugal_bonsai.run.keywords import ADAPT_KEYWORDS, PRUNE_KEYWORDS, _names
from frugal_bonsai.run.options import AdaptOptions, BenchOptions, EvalOptions, PruneOptions

# Options about the process and its output, which Python has other means for.
PROCESS = {"as_json", "threads", "dry_run", "config"}
FUNCTIONS = {
    "prune": (frugal_bonsai.prune, PRUNE_KEYWORDS),
    "plan": (frugal_bonsai.plan, PRUNE_KEYWORDS),
    "adapt": (frugal_bonsai.adapt, ADAPT_KEYWORDS),
    "eval": (frugal_bonsai.evaluate, _names(EvalOptions)),
    "bench": (frugal_bonsai.bench, _names(BenchOptions) - {"threads"}),
    "shrink": (frugal_bonsai.shrink, set()),
    "export": (frugal_bonsai.export_gguf, set()),
    "inspect": (frugal_bonsai.inspect, set()),
}
# Arguments of functions that only Python can pass.
PYTHON = {"options", "named", "utility", "progress", "on_plan"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_keywords_are_the_names_of_the_options(name: str) -> None:
    function, named = FUNCTIONS[name]
    parameters = set(inspect.signature(function).parameters)
    options = {
        str(param.name)
        for param in cli.commands[name].params
        if param.expose_value and not getattr(param, "hidden", False)
    }
    options -= PROCESS | ({"kind"} if name == "export" else set())  # one format: export_gguf
    if name == "plan":  # keywords of prune that change no plan
        named = named - {"max_shard_size", "eval_tasks", "task_data", "eval_limit", "report"}
    assert (parameters - PYTHON) | named == options


def test_options_by_name_and_as_an_object_are_the_same() -> None:
    caps = {"max_cpu_mem": "3GB", "windows": 8, "window": 64}
    by_name = frugal_bonsai.plan("example", sparsity=0.3, method="magnitude", **caps)
    settings = {"sparsity": 0.3}
    options = PruneOptions(settings=settings, method="magnitude", **caps)
    as_object = frugal_bonsai.plan("example", options)
    for key in ("rounds", "windows", "forward_tokens", "micro_batch"):
        assert by_name[key] == as_object[key]
    with pytest.raises(OptionError, match="sparsity: pass keywords or options=PruneOptions"):
        frugal_bonsai.plan("example", options, sparsity=0.3)


def test_an_unknown_keyword_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="unknown keyword 'sparsty'; did you mean 'sparsity'"):
        frugal_bonsai.prune("example", tmp_path / "out", sparsty=0.3)
    with pytest.raises(OptionError, match="'learningrate'; did you mean 'learning_rate'"):
        frugal_bonsai.adapt("example", tmp_path / "out", data="stdlib", learningrate=1.0)
    with pytest.raises(OptionError, match=r"unknown keyword 'xyz'; known are .*text"):
        frugal_bonsai.evaluate("example", xyz=1)


def test_keywords_of_adapt_are_read_as_the_command_line_reads_them() -> None:
    from frugal_bonsai.run.keywords import adapt_options

    found = adapt_options(
        {
            "teacher": "example",
            "data": "stdlib",
            "rank": "auto",
            "tokens": "10k",
            "optimizer": "adamw",
            "hidden_layers": "1,2",
        }
    )
    settings = {"rank": None, "tokens": 10_000, "optimiser": "adamw"}
    assert found == AdaptOptions(
        teacher="example", data=("stdlib",), hidden_layers=(1, 2), settings=settings
    )
    minutes = adapt_options({"teacher": "example", "data": ["stdlib"], "minutes": 2})
    assert minutes.training().seconds == 120


def test_a_bar_in_notebooks_unless_silenced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(choose_progress(None), Silent)
    shell: Any = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", shell)
    assert isinstance(choose_progress(False), Silent)
    mine = Silent()
    assert choose_progress(mine) is mine
    bar = choose_progress(None)
    assert isinstance(bar, BarProgress)
    bar.round(1, 3, 0.25)
    bar.sweep("masks", 2, 64)
    bar.note("a note")
    bar.step("layer 0")
    bar.step()
    done = capsys.readouterr()
    assert "round 1/3, 25% removed: masks" in done.err and "a note" in done.out
    assert bar._bar is None, "a bar is removed at its end"
