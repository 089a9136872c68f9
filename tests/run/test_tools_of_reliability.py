"""tools/kill_anywhere.py and tools/soak.py work: two kills, a prune that is resumed."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_models import save_pair_tokenizer, tiny_llama

TOOLS = Path(__file__).parents[2] / "tools"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the tools are for Linux"),
]


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "m", vocab_size=512)
    save_pair_tokenizer(tmp_path / "m")
    return tmp_path / "m"


def test_two_kills(model: Path, tmp_path: Path) -> None:
    kill = tool("kill_anywhere")
    words = ["prune", str(model), "--sparsity", "0.3", "--step", "0.15", "--layout", "per-layer"]
    words += ["--calibration", "stdlib", "--level", "none", "--refine", "0", *kill.QUICK]
    command = kill.Command(words, "prune", resumes=True)
    trials = kill.Trials(command, "prune", tmp_path, random.Random(7))  # draws two kills
    trial = trials.run(2)
    assert len(trial["killed_at"]) == 2 and trial["lost"] == []
    assert not (tmp_path / "killed").exists()
    trials._whole["pruning_mask.json"] = "0"
    assert trials._differences(tmp_path / "whole-prune", "after a kill") == [
        "after a kill: pruning_mask.json differs"
    ]


def test_rounds_leave_nothing(model: Path, tmp_path: Path) -> None:
    soak = tool("soak")
    (tmp_path / "work").mkdir()
    assert soak.run_once(model, tmp_path / "work", 9, seed=0) > 2  # stopped and resumed
    assert list((tmp_path / "work").iterdir()) == []
    assert soak.read(1, tmp_path / "work").left == 0


def test_growth_is_told_from_noise() -> None:
    soak = tool("soak")
    leak = [soak.Reading(at, 2**20 * at, 6 + at // 4, 1, 0, 0) for at in range(0, 40, 5)]
    assert [line.partition(":")[0] for line in soak.growth(leak)] == ["resident_bytes", "files"]
    steady = [soak.Reading(at, 10**8 + at % 3 * 1000, 6, 1, 0, 0) for at in range(20)]
    assert soak.growth(steady) == []
