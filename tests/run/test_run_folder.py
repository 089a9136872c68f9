"""One run at a time works in a run directory; a run that was killed leaves no lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from commands import ENVIRONMENT, fail

from frugal_bonsai.errors import StateError
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.mask_file import write_mask
from frugal_bonsai.run.open import open_model
from frugal_bonsai.run.run_folder import empty, holds_files, locked, require_unlocked, run_folder

HOLD = """
import sys, time
from pathlib import Path
from frugal_bonsai.run.run_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "new" / "out.run"


def test_a_second_run_is_refused_at_its_start(folder: Path) -> None:
    out = folder.with_name("out")
    quick = ("--calibration", "stdlib", "--windows", "4", "--window", "64")
    with locked(folder):
        for words in (("prune", "example"), ("adapt", "example", "--data", "stdlib")):
            more = quick if words[0] == "prune" else ("--teacher", "example")
            text = fail(*words, "--out", out, *more)
            assert "out.run: another run is working there now" in text
            assert "another run" in fail(*words, "--out", out, "--resume", *more)


def test_shrink_and_export_hold_the_lock_of_their_output(tmp_path: Path, folder: Path) -> None:
    out, mask = folder.with_name("out"), tmp_path / "mask.json"
    with open_model("example", headers_only=True) as model:
        write_mask(mask, "example", model.spec, KeepMask(model.spec.table))
    commands = (("shrink", "example", "--mask", mask), ("export", "example"))
    with locked(folder):
        for words in commands:
            text = fail(*words, "--out", out)
            assert "out.run: another run is working there now" in text
        assert not out.exists()
    # While the work is done, the lock is held.
    for words, step in zip(
        commands, ("run.shrink.read_mask", "export.gguf_file.list_tensors"), strict=True
    ):
        target = out.with_name(words[0])
        with mock.patch(f"frugal_bonsai.{step}", side_effect=_require_locked(target)):
            assert "another run" in fail(*words, "--out", target)
        assert not target.exists() and not run_folder(target).exists()


def _require_locked(out: Path) -> Any:
    return lambda *_: require_unlocked(run_folder(out))


def test_a_killed_run_leaves_no_lock(folder: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(StateError, match="another run"):
            require_unlocked(folder)
        os.kill(process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()
    require_unlocked(folder)
    with locked(folder):
        pass


def test_the_partial_output_of_a_killed_run_is_removed(folder: Path) -> None:
    parent = folder.parent
    for name in (".out.partial-0123abcd", ".other.partial-0123abcd", ".out.partial-mine"):
        (parent / name).mkdir(parents=True)
        (parent / name / "model.safetensors").touch()
    (parent / ".out.partial-89abcdef").touch()
    with locked(folder):
        left = {path.name for path in parent.iterdir()}
    assert left == {".other.partial-0123abcd", ".out.partial-mine", "out.run"}


def test_nothing_is_left_of_a_run_that_left_nothing(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt), locked(folder):
        assert not holds_files(folder)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_run_stay_until_it_is_emptied(folder: Path) -> None:
    with locked(folder):
        (folder / "round_001").mkdir()
        (folder / "state.json").touch()
    assert holds_files(folder)
    with locked(folder):
        empty(folder)
    assert not folder.exists()
