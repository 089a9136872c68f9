"""The exit codes that the help explains, and what -q, -v and environment variables do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from frugal_bonsai.cli import main
from frugal_bonsai.errors import BudgetError


def run(*words: str | Path) -> int:
    """The exit code of a command line, run in this process."""
    with mock.patch("sys.argv", ["frugal-bonsai", *map(str, words)]):
        try:
            main()
        except SystemExit as ended:
            assert isinstance(ended.code, int)
            return ended.code
    return 0


def raising(error: BaseException) -> Any:
    """A stand-in for the body of ``inspect`` that raises."""

    def inspect(*_: Any, **__: Any) -> None:
        raise error

    return mock.patch("frugal_bonsai.run.inspect.inspect", inspect)


def test_done_is_0() -> None:
    assert run("--help") == run("prune", "--help-all") == run("inspect", "example") == 0


def test_an_error_that_the_user_can_mend_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", "no/such/folder") == run("prune", "example", "--sparsty", "1") == 2
    assert run("inspect") == run("no-such-command") == 2
    with raising(BudgetError("does not fit")):
        assert run("inspect", "example") == 2
    assert "frugal-bonsai: does not fit\n" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback() -> None:
    with raising(ZeroDivisionError()), pytest.raises(ZeroDivisionError):
        run("inspect", "example")  # Python prints the traceback and ends with 1


def test_ctrl_c_is_130() -> None:
    with raising(KeyboardInterrupt()):
        assert run("inspect", "example") == 130


def signalled(*numbers: int, cleaned: list[str]) -> Any:
    """A stand-in for ``inspect`` that is sent signals; the later ones while it cleans up."""

    def inspect(*_: Any, **__: Any) -> None:
        try:
            _send(numbers[0])
        finally:
            for number in numbers[1:]:
                _send(number)
            cleaned.append("done")

    return mock.patch("frugal_bonsai.run.inspect.inspect", inspect)


def _send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)  # a handler runs between two steps of Python


@pytest.mark.skipif(os.name == "nt", reason="signals are sent another way on Windows")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_stops_once_and_the_cleaning_up_is_not_disturbed(
    name: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    number, cleaned = getattr(signal, name), list[str]()
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with signalled(number, signal.SIGTERM, signal.SIGINT, cleaned=cleaned):
        assert run("inspect", "example") == code
    errors = capsys.readouterr().err
    assert cleaned == ["done"] and "frugal-bonsai: stopped" in errors
    assert "cleaning up; Ctrl-C once more ends at once" in errors
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with (
            signalled(signal.SIGHUP, cleaned=[]),
            mock.patch("frugal_bonsai.cli.measure.print_result"),
        ):
            assert run("inspect", "example") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you")]
)
def test_a_lack_of_memory_is_the_users_error(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    with raising(error):
        assert run("inspect", "example") == 2
    assert "frugal-bonsai: memory ran out (" in capsys.readouterr().err
    with raising(RuntimeError("a defect")), pytest.raises(RuntimeError):
        run("inspect", "example")


def test_verbose_says_where_an_error_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    with raising(BudgetError("does not fit")):
        assert run("inspect", "example") == 2
        assert "Traceback" not in capsys.readouterr().err
        assert run("inspect", "example", "-v") == 2
    assert "Traceback" in capsys.readouterr().err


EVAL = ("eval", "example", "--text", "stdlib", "--window", "64", "--windows", "2")


def test_quiet_prints_the_result_alone_and_verbose_a_line_for_each_layer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*EVAL, "-q") == 0
    quiet = capsys.readouterr()
    assert quiet.err == "" and "perplexity" in quiet.out
    assert run(*EVAL) == 0
    normal = capsys.readouterr().err.splitlines()
    assert run(*EVAL, "-v") == 0
    assert len(capsys.readouterr().err.splitlines()) > len(normal) > 0
    assert run(*EVAL, "-v", "-q") == 2
    assert "leave one out" in capsys.readouterr().err


def test_caps_come_from_the_environment_and_the_command_line_wins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("FRUGAL_BONSAI_MAX_CPU_MEM", "24")
    assert run(*EVAL) == 2
    message = "--max-cpu-mem (from FRUGAL_BONSAI_MAX_CPU_MEM): '24' has no unit"
    assert message in capsys.readouterr().err
    monkeypatch.setenv("FRUGAL_BONSAI_MAX_CPU_MEM", "10MB")
    assert run(*EVAL) == 2
    assert "--max-cpu-mem" in capsys.readouterr().err
    assert run(*EVAL, "--max-cpu-mem", "20GB") == 0
    # llama.cpp takes no caps: those of the environment are not for it.
    assert run("eval", tmp_path, "--text", "stdlib", "--runtime", "llama.cpp") == 2
    assert "does not know" not in capsys.readouterr().err
