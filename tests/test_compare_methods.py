"""tools/compare_methods.py: its table, and that a finished run is not run again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "compare_methods.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_methods", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _row(method: str, seed: int, perplexity: float) -> dict[str, Any]:
    return {
        "method": method,
        "target": 0.2,
        "seed": seed,
        "sparsity": 0.2,
        "perplexity": perplexity,
        "tokens": 1_500_000,
        "seconds": 10.0,
        "dense": 5.0,
    }


def test_table_has_means_and_spreads_over_the_seeds(tool: ModuleType) -> None:
    text = tool.table(
        [_row("local-only", 0, 8.0), _row("local-only", 1, 10.0), _row("paper", 0, 15.5)]
    )
    assert text.splitlines()[2:] == [
        "| local-only | 20.00% | 9.00 | 1.41 | 2 | 1.50 M | 10 |",
        "| paper | 20.00% | 15.50 |  | 1 | 1.50 M | 10 |",
    ]


def test_finished_runs_are_kept_and_not_repeated(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float, int]] = []

    def run(options: Any, method: str, sparsity: float, seed: int) -> dict[str, Any]:
        asked.append((method, sparsity, seed))
        return _row(method, seed, 9.0)

    monkeypatch.setattr(tool, "run_one", run)
    words = ["example", "--eval-text", "stdlib", "--out", str(tmp_path / "r.md")]
    words += ["--sparsities", "0.2", "--methods", "local-only,paper"]
    tool.main([*words, "--seeds", "0"])
    tool.main([*words, "--seeds", "0,1"])
    assert asked == [
        ("local-only", 0.2, 0),
        ("paper", 0.2, 0),
        ("local-only", 0.2, 1),
        ("paper", 0.2, 1),
    ]
    assert len(json.loads((tmp_path / "r.json").read_text())) == 4
    assert (tmp_path / "r.md").read_text().count("| local-only |") == 1
    with pytest.raises(SystemExit):
        tool.main([*words, "--methods", "no such"])
