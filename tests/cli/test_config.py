"""``--config FILE``: the same options as on the command line, which wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from frugal_bonsai.cli import cli
from frugal_bonsai.errors import OptionError


def params(command: str, file: Path, *words: str) -> dict[str, Any]:
    """The parameters of a command with this file."""
    found = cli.commands[command].make_context(command, ["--config", str(file), *words])
    return dict(found.params)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.toml"


def test_values_are_read_as_on_the_command_line_which_wins(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(
        'model = "example"\nout = "out"\nsparsity = 0.25\nself-windows = "auto"\n'
        'max-cpu-mem = "3GB"\nmax-gpu-mem = "8GB"\nno-recovery = true\nbias = false\n'
        'text-only = true\nno-report = true\ntask-data = ["a", "b"]\nwindows = 8\n',
        encoding="utf-8",
    )
    monkeypatch.setenv("FRUGAL_BONSAI_MAX_GPU_MEM", "4GB")
    found = params("prune", file, "--windows", "16", "--recovery")
    assert found["model"] == "example" and found["out"] == "out"
    assert found["sparsity"] == 0.25 and found["self_windows"] is None
    assert found["windows"] == 16 and found["recovery"] is True, "the command line wins"
    assert found["max_cpu_mem"] == 3 * 10**9
    assert found["max_gpu_mem"] == 4 * 10**9, "a variable wins over the file"
    assert found["bias"] is found["report"] is False and found["text_only"] is True
    assert found["task_data"] == ("a", "b")
    assert found["layout"] == "uniform" and found["seed"] is None, "defaults stay"
    assert params("prune", file)["recovery"] is False


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sparsty = 0.3", "unknown option 'sparsty'; did you mean 'sparsity'?"),
        ("max_cpu_mem = '3GB'", "unknown option 'max_cpu_mem'; did you mean 'max-cpu-mem'?"),
        ("sparsity = 'half'", "'sparsity': 'half' is not a valid float"),
        ("windows = 2.5", "'windows': '2.5' is not a valid integer"),
        ("max-cpu-mem = 24", "'max-cpu-mem': --max-cpu-mem: '24' has no unit; did you mean 24GB?"),
        ("layout = 'square'", "'layout': 'square' is not one of 'uniform'"),
        ("recovery = 'yes'", "'recovery': 'yes' is not true or false"),
        ("recovery = true\nno-recovery = true", "'no-recovery': the same option is there under"),
        ("sparsity = [0.3]", "'sparsity': [0.3] is not one value"),
        ("task-data = 'a'", "'task-data': 'a' is not a list"),
        ("[prune]\nsparsity = 0.3", "unknown option 'prune'"),
        ("config = 'other.toml'", "unknown option 'config'"),
        ("sparsity 0.3", "is no TOML file: Expected '='"),
    ],
)
def test_errors_name_the_file_the_key_and_what_to_write(
    file: Path, text: str, expected: str
) -> None:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(OptionError) as error:
        params("prune", file, "example", "--out", "out")
    assert str(error.value).startswith(f"--config {file}: {expected}")


def test_a_file_that_is_not_there(file: Path) -> None:
    with pytest.raises(OptionError, match=r"run\.toml: cannot be read \(No such file"):
        params("adapt", file, "example", "--data", "stdlib")


def test_plan_takes_the_file_of_a_prune(file: Path) -> None:
    file.write_text('model = "example"\nout = "o"\nmax-shard-size = "5GB"\n', encoding="utf-8")
    assert "out" not in params("plan", file)
