"""tools/compare_methods.py: its tables and plots, and that a finished run is not run again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from frugal_bonsai.text.stdlib import held_out_text

TOOL = Path(__file__).parents[1] / "tools" / "compare_methods.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_methods", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _row(method: str, seed: int, perplexity: float, **changes: Any) -> dict[str, Any]:
    return {
        "model": "models/small",
        "method": method,
        "options": "",
        "layout": "per-layer",
        "windows": 64,
        "target": 0.2,
        "seed": seed,
        "sparsity": 0.2,
        "perplexity": perplexity,
        "dense": 5.0,
        "tokens": 1_500_000,
        "seconds": 10.0,
        "attention_units_gone": 0,
        **changes,
    }


def test_tables_have_means_and_spreads_over_the_seeds_of_each_model(tool: ModuleType) -> None:
    rows = [
        _row("paper", 0, 15.5, target=0.5, sparsity=0.5),
        _row("local-only", 0, 8.0),
        _row("local-only", 1, 10.0, attention_units_gone=2),
        _row("local-only", 1, 9.5, options="masks 4", windows=None),
        _row("local-only", 0, 20.0, model="other", dense=7.0),
    ]
    text = tool.tables(rows)
    first, second = text.split("## ")[1:]
    assert first.startswith("small, dense 5.00\n") and second.startswith("other, dense 7.00\n")
    assert first.splitlines()[4:] == [
        "| local-only | 64 | 20.00% | 9.00 | 8.00 to 10.00 | 0, 1 | 0, 2 | 1.50 M | 10 |",
        "| local-only (masks 4) |  | 20.00% | 9.50 |  | 1 | 0 | 1.50 M | 10 |",
        "| paper | 64 | 50.00% | 15.50 |  | 0 | 0 | 1.50 M | 10 |",
        "",
    ]
    assert "| local-only | 64 | 20.00% | 20.00 |  | 0 | 0 | 1.50 M | 10 |" in second


def test_finished_runs_are_kept_and_not_repeated(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def run(given: Any, key: dict[str, Any]) -> dict[str, Any]:
        asked.append((key["model"], key["method"], key["options"], key["seed"]))
        return _row("", 0, 9.0) | key

    monkeypatch.setattr(tool, "run_one", run)
    words = ["a", "b", "--eval-text", "stdlib", "--out", str(tmp_path / "r.md")]
    words += ["--sparsities", "0.2", "--methods", "local-only,paper"]
    tool.main([*words, "--seeds", "0"])
    tool.main([*words, "--seeds", "0,1"])
    names = ("local-only", "paper")
    assert asked == [(m, name, "", seed) for seed in (0, 1) for m in "ab" for name in names]
    # Another setting, or other windows, is another run.
    tool.main([*words, "--seeds", "0", "--set", '{"masks": 4}'])
    tool.main([*words, "--seeds", "0", "--windows", "32"])
    assert [run[2] for run in asked[8:]] == ["masks 4"] * 4 + [""] * 4
    assert len(json.loads((tmp_path / "r.json").read_text())) == 16
    assert (tmp_path / "r.md").read_text().count("| local-only |") == 4
    with pytest.raises(SystemExit):
        tool.main([*words, "--methods", "no such"])


def test_a_real_comparison_of_the_example_model(tool: ModuleType, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(held_out_text()[:3000], encoding="utf-8")
    words = ["example", "--eval-text", str(text), "--window", "32", "--windows", "4"]
    words += ["--methods", "random,depth", "--sparsities", "0.2", "--seeds", "0"]
    plotted = _has_matplotlib()
    plot = ["--plot", str(tmp_path / "r.png")] if plotted else []
    tool.main([*words, *plot, "--out", str(tmp_path / "r.md")])
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [row["method"] for row in rows] == ["random", "depth"]
    for row in rows:
        assert row["tokens"] == 4 * 32 and row["perplexity"] > row["dense"] > 1
    assert rows[1]["attention_units_gone"] == 4  # those of one layer
    assert (tmp_path / "r.md").read_text().startswith("## example, dense ")
    if plotted:
        assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def _has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None
