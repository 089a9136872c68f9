"""Faults in the middle of a prune: disk, memory, clock. The state is kept, a resume ends alike."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_byte_tokenizer, tiny_llama

from frugal_bonsai.bonsai.importance.scores import ImportanceBuilder
from frugal_bonsai.bonsai.search import Search
from frugal_bonsai.checkpoint import files
from frugal_bonsai.errors import BudgetError, CheckpointError
from frugal_bonsai.progress import Silent
from frugal_bonsai.rewrite import verify
from frugal_bonsai.run import open as run_open
from frugal_bonsai.run import prune as run_prune
from frugal_bonsai.run.events import read_events
from frugal_bonsai.run.options import PruneOptions
from frugal_bonsai.run.prune import prune
from frugal_bonsai.run.runs import list_runs

CANNOT = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"


def options(**given: Any) -> PruneOptions:
    settings = {"sparsity": 0.4, "step": 0.2, "masks": 4, "mask_windows": 4, **given}
    return PruneOptions(
        layout="per-layer",
        settings=settings,
        calibration="stdlib",
        windows=8,
        window=32,
        max_cpu_mem="4GB",
        device="cpu",
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "dense"
    tiny_llama(folder, vocab_size=259)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def mask(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The mask of a run without a fault."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prune(str(model), out, options())
    return (out / "pruning_mask.json").read_text()


class At(Silent):
    """Calls a function when the statistics of the second round begin."""

    def __init__(self, fault: Callable[[], None]) -> None:
        self._fault, self._round = fault, 0

    def round(self, number: int, rounds: int, sparsity: float) -> None:
        self._round = number

    def sweep(self, name: str, steps: int, tokens_per_step: int) -> None:
        if self._round == 2 and name.startswith("masked evaluation"):
            self._round = 3
            self._fault()


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _failing_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "_PREADV", fail)


@pytest.mark.parametrize("fault", ["read", "flip", "cut", "shard"])
def test_a_disk_that_fails_in_the_second_round(
    fault: str, model: Path, mask: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, run = tmp_path / "source", tmp_path / "out", tmp_path / "out.run"
    shutil.copytree(model, source)
    weights, layer = source / "model.safetensors", "layer_00001.safetensors"
    faults: dict[str, tuple[Callable[[], None], str]] = {
        "read": (lambda: _failing_reads(monkeypatch), r"cannot be read at byte \d+ \(Input/output"),
        "flip": (
            lambda: _flip(next(run.rglob(layer))),
            "differs from its checksum",
        ),
        "cut": (lambda: os.truncate(next(run.rglob(layer)), 900), "the file ends"),
        "shard": (lambda: os.truncate(weights, 900), "the file ends at byte 900"),
    }
    act, text = faults[fault]
    with pytest.raises(CheckpointError, match=text):
        prune(str(source), out, options(), progress=At(act))
    monkeypatch.undo()
    assert not out.exists() and len(json.loads((run / "state.json").read_text())["rounds"]) == 1
    shutil.copy(model / "model.safetensors", weights)
    prune(str(source), out, options(), resume=True)
    assert (out / "pruning_mask.json").read_text().replace("source", "dense") == mask
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(CANNOT)], ids=["python", "torch"])
@pytest.mark.parametrize(
    ("owner", "name", "phase"),
    [
        (run_prune, "prepare_run", "the preparation"),
        (run_prune, "_measure", "the preparation"),
        (ImportanceBuilder, "build", "statistics"),
        (Search, "_cut", "statistics"),
        (run_open, "write_companions", "masked evaluation"),
        (verify, "compare_logits", "masked evaluation"),
    ],
    ids=["preparing", "measuring", "statistics", "regression", "writing", "verifying"],
)
def test_a_lack_of_memory_names_the_phase(
    owner: Any,
    name: str,
    phase: str,
    error: Exception,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lack(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(owner, name, lack)
    if owner is verify:
        monkeypatch.setattr(run_prune, name, lack)
    quick = options(step=0.4, recovery=False)
    with pytest.raises(
        BudgetError, match=rf"memory ran out in {phase}.*, or after it \(.*; close other programs"
    ):
        prune(str(model), tmp_path / "out", quick)
    assert not (tmp_path / "out").exists()


def test_a_clock_that_jumps_back(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, jump = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() - jump[0])
    monkeypatch.setattr(time, "gmtime", lambda *_: time.localtime(real() - jump[0]))

    def jump_back() -> None:
        jump[0] = 10 * 365 * 86400.0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(str(model), tmp_path / "a", options(), progress=At(jump_back))
    assert [run["out"] for run in list_runs(tmp_path)] == ["a"]
    summary = prune(str(model), tmp_path / "a", options(), resume=True)
    events = read_events(tmp_path / "a")
    assert summary["seconds"] > 0 and all(r["seconds"] >= 0 for r in summary["rounds"])
    assert all(event["seconds"] >= 0 for event in events)
    starts = [event["at"] for event in events if event["event"] == "start"]
    assert len(starts) == 2 and starts[1] < starts[0]
    [run] = list_runs(tmp_path)
    assert run["state"] == "finished" and run["began"] == starts[0]
