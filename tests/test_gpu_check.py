"""tools/gpu_check.py: its dry run, and that no failure takes other figures with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).parents[1] / "tools"
SCRIPT = TOOLS / "gpu_check.py"
# Each step's tables.
TABLES = {
    "example": {"prunes of example", "masks of both devices"},
    "tests": {"tests"},
    "caps": {"an 8B shape under caps"},
    "race": {"the expected losses", "sweeps", "under the sanitizer"},
    "profile": {"profile", "prunes of an 8B shape", "phases of these prunes"},
    "speed": {
        "the masked sweep",
        "streamed against a model in memory",
        "masks one at a time",
    },
    "gram": {"Gram products", "a factor and its solves"},
    "memory": {"losses after memory ran out"},
    "adapt": {"short trainings"},
}


def _command(*words: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *words]


def _environment() -> dict[str, str]:
    """Nothing says where the package is: it is found in the source tree."""
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**known, "OMP_NUM_THREADS": "1"}


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(*words), capture_output=True, text=True, env=_environment())


def _lines(out: Path) -> list[dict[str, Any]]:
    text = (out / "gpu_check.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _of(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.slow
def test_dry_run_has_every_figure_on_its_page_and_no_failure(tmp_path: Path) -> None:
    # One test, because the run takes longer than all other tests of this file together.
    done = _run("--dry-run", "--out", str(tmp_path / "dry"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    _check_figures(tmp_path / "dry", done.stdout)
    _check_page(tmp_path / "dry", tmp_path / "again")


def _check_figures(out: Path, printed: str) -> None:
    lines = _lines(out)
    assert lines[0]["kind"] == "machine" and lines[0]["torch"] == torch.__version__
    assert _of(lines, "failure") == []
    found: dict[str, set[str]] = {}
    for line in _of(lines, "figure"):
        found.setdefault(line["step"], set()).add(line["table"])
    assert {step: found[step] & names for step, names in TABLES.items()} == TABLES
    assert [line["step"] for line in _of(lines, "done")] == list(TABLES)
    assert printed == (out / "gpu_check.jsonl").read_text(encoding="utf-8")


def _check_page(out: Path, again: Path) -> None:
    """The page has every table, and is made again from the lines alone."""
    [page] = out.glob("gpu_dry-run_*.md")
    text = page.read_text(encoding="utf-8")
    for step, names in TABLES.items():
        assert f"\n## {step}\n" in text
        for name in names:
            assert f"\n{name[:1].upper()}{name[1:]}:\n\n| " in text
    assert str(out) not in text and str(TOOLS.parent) not in text, "a path of this machine"
    done = _run("--render", str(out / "gpu_check.jsonl"), "--out", str(again))
    assert done.returncode == 0, done.stderr
    assert (again / page.name).read_text(encoding="utf-8") == text


@pytest.mark.slow
def test_processes_of_their_own_give_the_same_lines(tmp_path: Path) -> None:
    done = _run("--dry-run", "--processes", "--only", "race", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    tables = {line["table"] for line in _of(_lines(tmp_path), "figure")}
    assert tables == TABLES["race"]


@pytest.mark.slow
def test_what_is_cut_off_keeps_its_lines(tmp_path: Path) -> None:
    words = _command("--dry-run", "--only", "gram,memory", "--out", str(tmp_path))
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=_environment()) as process:
        assert process.stdout is not None
        first = [process.stdout.readline(), process.stdout.readline()]
        process.kill()
    lines = _lines(tmp_path)
    assert lines[:2] == [json.loads(line) for line in first]
    assert lines[0]["kind"] == "machine" and lines[1]["step"] == "gram"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool's own modules can be imported."""
    monkeypatch.syspath_prepend(str(TOOLS))


def _check(tmp_path: Path, written: list[dict[str, Any]], **changes: Any) -> Any:
    from gpu_checks.check import Check

    values = {
        "device": torch.device("cpu"),
        "dry": True,
        "work": tmp_path,
        "out": tmp_path,
        "until": time.time() + 60.0,
        "write": written.append,
        "arguments": None,
    }
    return Check("gram", **{**values, **changes})


@pytest.mark.usefixtures("tools")
def test_a_failure_is_a_line_and_the_rest_goes_on(tmp_path: Path) -> None:
    written: list[dict[str, Any]] = []
    check = _check(tmp_path, written)
    with check.part("first"):
        check.figure("table", value=1.0, none=None, infinite=float("inf"))
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    with check.part("second"):
        check.figure("table", value=2.0)
    assert [line["kind"] for line in written] == ["figure", "failure", "figure"]
    assert written[0]["infinite"] == "inf" and written[0]["none"] is None
    assert written[1]["part"] == "first" and written[1]["error"] == "RuntimeError"
    assert "illegal memory access" in written[1]["message"]
    assert written[1]["last_lines"][0].startswith("tests/test_gpu_check.py:")
    assert check.failures == 1


@pytest.mark.usefixtures("tools")
def test_a_step_that_cannot_be_loaded_is_a_line(tmp_path: Path) -> None:
    from gpu_checks.steps import Step

    written: list[dict[str, Any]] = []
    step = Step(name="gram", home="nowhere:run", about="", limit_seconds=1, needs_seconds=1)
    step.run(_check(tmp_path, written))
    assert [line["error"] for line in written] == ["ModuleNotFoundError"]


@pytest.mark.usefixtures("tools")
def test_a_process_that_dies_or_hangs_is_told(tmp_path: Path) -> None:
    from gpu_checks.processes import run_child

    log, written = tmp_path / "log", list[dict[str, Any]]()
    known: dict[str, Any] = {"log": log, "write": written.append, "add": {}}
    died = run_child(["--only", "nothing"], seconds=60, **known)
    assert died.error == "ended with code 2" and not died.failed
    assert "unknown steps ['nothing']" in log.read_text(encoding="utf-8")
    hung = run_child(["--dry-run", "--only", "tests"], seconds=0.2, own_group=True, **known)
    assert hung.error == "timed out after 0 s" and written == []


@pytest.mark.usefixtures("tools")
def test_a_child_that_dies_is_a_failure_of_its_step(tmp_path: Path) -> None:
    written: list[dict[str, Any]] = []
    check = _check(tmp_path, written, arguments=["--only", "nothing"])
    check.child("variant", {}, seconds=30, here=lambda check: None)
    [line] = written
    assert (line["kind"], line["part"], line["error"]) == (
        "failure",
        "variant",
        "ended with code 2",
    )
    assert "unknown steps" in line["message"] and check.failures == 1


@pytest.mark.usefixtures("tools")
def test_steps_without_time_are_left_out(tmp_path: Path) -> None:
    done = _run(
        "--dry-run", "--only", "gram,adapt", "--budget-seconds", "1", "--out", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    lines = _lines(tmp_path)
    assert [line["step"] for line in _of(lines, "skipped")] == ["gram", "adapt"]
    assert "it needs 15" in _of(lines, "skipped")[0]["why"]
    [page] = tmp_path.glob("*.md")
    assert "Left out: " in page.read_text(encoding="utf-8")


@pytest.mark.usefixtures("tools")
def test_what_the_sanitizer_found_is_told_with_its_lines() -> None:
    from gpu_checks.race import _found
    from torch.cuda._sanitizer import Access, AccessType, UnsynchronizedAccessError

    def access(kind: AccessType, stream: int) -> Access:
        stack = traceback.extract_stack()
        return Access(kind, 1, stream, "aten::copy_(Tensor(a!) self)", ["self"], False, stack)

    error = UnsynchronizedAccessError(
        7, None, access(AccessType.WRITE, 5), access(AccessType.READ, 0)
    )
    text = _found(error)
    assert text.startswith("reading from ['self'] by aten::copy_ on stream 0 (")
    assert " before writing to ['self'] by aten::copy_ on stream 5 (" in text
    assert "tests/test_gpu_check.py:" in text


MACHINE = {"step": "machine", "kind": "machine", "card": "NVIDIA H100 80GB", "date": "2027-01-02"}


def _row(step: str, value: float) -> dict[str, Any]:
    return {"step": step, "kind": "figure", "table": "sizes", "peak_bytes": 3 * 2**30, "n": value}


@pytest.mark.usefixtures("tools")
def test_page_takes_the_last_run_of_a_step_and_shows_failures() -> None:
    from gpu_checks.check import failure
    from gpu_checks.page import page_name, render

    first = [MACHINE, _row("gram", 1.0), _row("race", 2.0)]
    second = [MACHINE, _row("gram", 3.0), failure("gram", "TF32", "RuntimeError", "no | it", ["x"])]
    text = render([*first, *second])
    assert page_name(first) == "gpu_nvidia-h100-80gb_2027-01-02.md"
    assert (
        "| peak | n |\n| --- | --- |\n| 3.00 GiB | 3 |" in text and "| 3.00 GiB | 1 |" not in text
    )
    assert "| 3.00 GiB | 2 |" in text, "a step that only the first run had"
    assert "**Failed: TF32.** RuntimeError: no | it\n\n```\nx\n```" in text


@pytest.mark.usefixtures("tools")
def test_a_line_that_was_cut_off_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpu_checks.check import Book, read_lines

    book = Book(tmp_path / "folder" / "lines.jsonl", {"/place": "WORK"})
    book.write({"step": "gram", "kind": "skipped", "why": "/place/file"})
    with book.path.open("a", encoding="utf-8") as file:
        file.write('{"step": "gr')
    [line] = read_lines(book.path)
    assert line["why"] == "WORK/file" and line["at_seconds"] >= 0
    assert "lines.jsonl:2" in capsys.readouterr().err
