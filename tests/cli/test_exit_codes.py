"""The exit codes that the help explains, and what -q, -v and environment variables do."""

from __future__ import annotations

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
