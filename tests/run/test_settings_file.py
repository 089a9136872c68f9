"""``run.toml`` of an output: the same command with this file makes the same output."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import fail
from commands_here import result

import frugal_bonsai
from frugal_bonsai.plain_toml import exact_size, toml_literal

TEXT = ("--window", "64", "--windows", "8", "--max-cpu-mem", "3GB")


def same(first: Path, second: Path) -> None:
    """Both outputs have the same settings and weights."""
    for name in ("run.toml", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_prune_again_from_its_file(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    method = ("--method", "local-only", "--refine", "0", "--self-windows", "2", "--seed", "3")
    report = result("prune", "example", "--sparsity", "0.2", *method, *TEXT, "--out", first)
    again = result("prune", "--config", first / "run.toml", "--out", second)
    assert again["settings"] == report["settings"]
    same(first, second)


def test_an_adaptation_again_from_its_file(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    words = ("--teacher", "example", "--data", "stdlib", "--tokens", "1k", "--batch", "2", *TEXT)
    report = result("adapt", "example", *words, "--rank", "4", "--out", first)
    again = result("adapt", "--config", first / "run.toml", "--out", second)
    optimiser = report["training"]["optimiser"]  # decided by the plan
    assert again["settings"] == report["settings"] | {"optimiser": optimiser}
    same(first, second)


def test_settings_that_only_python_has_are_named(tmp_path: Path) -> None:
    settings = {"sparsity": 0.2, "pool": 3.0, "level": "none", "recovery": False, "step": 1.0}
    options = frugal_bonsai.PruneOptions(
        settings=settings, window=64, windows=8, max_cpu_mem="3GB", eval_tasks=None
    )
    frugal_bonsai.prune("example", tmp_path / "out", options)
    text = (tmp_path / "out" / "run.toml").read_text(encoding="utf-8")
    assert "# pool was set from Python, and is not in this file.\n" in text
    assert "recovery = false\n" in text and "refine" not in text, "refine belongs to recovery"


def test_a_key_that_is_unknown_ends_the_command(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("sparsty = 0.3\n", encoding="utf-8")
    words = ("prune", "example", "--config", tmp_path / "run.toml", "--out", tmp_path / "out")
    assert "did you mean 'sparsity'?" in fail(*words)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(24 * 10**9, "24GB"), (2**31, "2GiB"), (15 * 10**8, "1500MB"), (123, "123B"), ("1GB", "1GB")],
)
def test_sizes_are_written_exactly(size_bytes: int | str, text: str) -> None:
    assert exact_size(size_bytes) == text


def test_literals() -> None:
    assert toml_literal('a "b"\n\x7f') == '"a \\"b\\"\\n\\u007f"'
    assert [toml_literal(v) for v in (True, 3, 1e-05, ["a", "b"])] == [
        "true",
        "3",
        "1e-05",
        '["a", "b"]',
    ]
