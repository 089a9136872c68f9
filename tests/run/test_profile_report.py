"""The page on machines, and plans of a config.json alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import fail
from commands_here import here, result
from tiny_models import FAMILY_CONFIGS, save_tiny

from frugal_bonsai.checkpoint.locate import find_model
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.run import profile as measuring
from frugal_bonsai.run import profile_report
from frugal_bonsai.run.from_config import config_folder, open_config

SHAPES = """
["tiny (Llama)"]
model_type = "llama"
vocab_size = 512
hidden_size = 64
intermediate_size = 192
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 4096

["large (Llama)"]
model_type = "llama"
vocab_size = 32_000
hidden_size = 16_384
intermediate_size = 65_536
num_hidden_layers = 2
num_attention_heads = 128
num_key_value_heads = 8
max_position_embeddings = 4096
"""


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shapes.toml"
    path.write_text(SHAPES, encoding="utf-8")
    monkeypatch.setattr(profile_report, "SHAPES_FILE", path)


def test_machines_stand_side_by_side(shapes: None, tmp_path: Path) -> None:
    page = tmp_path / "cards.json"
    words = ("profile", "--profile", "rtx-8gb", "--profile", "laptop-cpu-16gb", "-q")
    assert f"written: {page}" in here(*words, "--report", page)
    found = json.loads(page.read_text(encoding="utf-8"))
    assert found["title"] == "What rtx-8gb, laptop-cpu-16gb can prune"
    rates, overview, gpu, cpu = found["sections"]
    assert ["matrix products, int8", "84.6 Tflop/s", "1.18 Tflop/s"] in rates["rows"]
    assert ["GPU memory", "7.60 GiB", "-"] in rates["rows"]
    tiny, large = overview["rows"]
    assert "bound by" in tiny[1] and "GiB" not in tiny[1].partition(";")[0]
    assert large[1].startswith("does not fit: needs ") and large[1].endswith("GiB GPU")
    assert [row[:2] for row in gpu["rows"]] == [
        *(["tiny (Llama)", "512"], ["tiny (Llama)", "2,048"]),
        *(["large (Llama)", "512"], ["large (Llama)", "2,048"]),
    ]
    assert [row[4] for row in cpu["rows"]] == ["yes", "yes", *(row[4] for row in cpu["rows"][2:])]
    # The smallest cap is the planner's own, and it holds.
    refused = fail("plan", "example", "--profile", "rtx-8gb", "--max-gpu-mem", "1MB")
    assert "The smallest --max-gpu-mem that works" in refused
    caps = found["charts"]["caps"]
    assert caps["levels"] == {"rtx-8gb": pytest.approx(7.6, abs=0.01)}
    assert caps["parts"]["smallest cap"][1] > 7.6


def test_the_page_replaces_pages_alone_and_says_what_is_wrong_first(tmp_path: Path) -> None:
    mine = tmp_path / "mine.md"
    mine.write_text("mine", encoding="utf-8")
    words = ("profile", "--profile", "rtx-8gb", "--report")
    assert "exists and is no page" in fail(*words, mine)
    assert "expected .html, .md or .json" in fail(*words, tmp_path / "page.pdf")
    text = fail("profile", "--profile", "rtx-9gb", "--report", tmp_path / "page.md")
    assert "rtx-9gb: cannot be read" in text and "rtx-12gb, " in text
    assert "--profile is for --report FILE" in fail("profile", "--profile", "rtx-8gb")
    assert mine.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    "family",
    ["llama", "gpt2", "falcon-groups", "phi3", "mixtral", "deepseek-v3", "qwen3_5", "granite4"],
)
def test_the_shapes_of_a_config_are_those_of_its_checkpoint(family: str, tmp_path: Path) -> None:
    model_type, config = FAMILY_CONFIGS[family]
    save_tiny(tmp_path / "whole", model_type, **config)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", alone)
    with Checkpoint.open(tmp_path / "whole") as expected, open_config(alone) as found:
        assert {n: (e.shape, e.dtype) for n, e in found.tensors.items()} == {
            n: (e.shape, e.dtype) for n, e in expected.tensors.items()
        }


def test_a_plan_of_a_config_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(find_model("example") / "config.json", alone)
    words = ("--profile", "rtx-8gb", "--calibration", "stdlib")
    expected, found = result("plan", "example", *words), result("plan", alone, *words)
    for key in ("parameters", "totals", "seconds", "memory_phases", "forward_tokens"):
        if key == "totals":  # the tokenizer is copied to an output
            expected[key].pop("disk"), found[key].pop("disk")
        assert found[key] == expected[key], key
    assert any("config.json alone" in note for note in found["notes"])
    assert result("plan", alone / "config.json", *words)["seconds"] == expected["seconds"]
    # Only a plan needs no weights.
    text = fail("prune", alone, "--out", tmp_path / "out", "--calibration", "stdlib")
    assert "alone" in text and not (tmp_path / "out").exists()
    assert config_folder(str(find_model("example"))) is None


def test_a_config_of_no_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}', encoding="utf-8")
    text = fail("plan", tmp_path, "--profile", "rtx-8gb")
    assert "config.json" in text and "transformers does not accept it" in text


def test_a_busy_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([(100.0, 50.0), (108.0, 51.0)])  # busy and idle seconds of all processors

    def cpu_times() -> Any:
        busy, idle = next(times)
        return _Times(user=busy, idle=idle)

    clock = iter([0.0, 5.0])
    monkeypatch.setattr(measuring.psutil, "cpu_times", cpu_times)
    monkeypatch.setattr(measuring.psutil, "cpu_count", lambda: 2)
    own = SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=0.0, system=0.0))
    monkeypatch.setattr(measuring.psutil, "Process", lambda: own)
    monkeypatch.setattr(measuring.time, "monotonic", lambda: next(clock))
    note = measuring._Others().note()
    assert note is not None and note.startswith("BUSY: other programs took 80% of the processors")


class _Times(tuple[float, float]):
    user: float
    idle: float

    def __new__(cls, user: float, idle: float) -> _Times:
        made = super().__new__(cls, (user, idle))
        made.user, made.idle = user, idle
        return made
