"""A loss beyond 709 nats, whose exp no float holds, ends neither a measurement nor a prune."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import frugal_bonsai, succeed
from safetensors.torch import load_file, save_file

from frugal_bonsai.checkpoint.locate import find_model
from frugal_bonsai.plain_json import json_text


@pytest.fixture
def overconfident(tmp_path: Path) -> Path:
    """The example with logits 3,000 times as large."""
    folder = tmp_path / "model"
    shutil.copytree(find_model("example"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 3e3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_numbers_that_are_not_finite_are_null_at_any_depth() -> None:
    values = {"a": [1.5, float("inf"), {"b": (float("nan"), None)}], "c": True}
    assert json.loads(json_text(values)) == {"a": [1.5, None, {"b": [None, None]}], "c": True}


def test_eval_says_inf_in_its_table_and_null_in_json(overconfident: Path) -> None:
    text = overconfident / "README.md"
    words = ("eval", overconfident, "--text", text, "--window", "64", "--windows", "2")
    result = succeed(*words)
    assert result["perplexity"] is None and result["nll"] > 709
    done = frugal_bonsai(*words)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines() if "perplexity" in line] == [
        "inf"
    ]


def test_a_prune_is_not_lost_to_its_report(overconfident: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quick = ("--windows", "4", "--window", "64", "--method", "local-only", "--sparsity", "0.2")
    summary = succeed("prune", overconfident, "--out", out, "--calibration", "stdlib", *quick)
    assert summary["before"]["perplexity"] is None and summary["after"]["perplexity"] is None
    report = json.loads(
        (out / "pruning_report.json").read_text(encoding="utf-8"),
        parse_constant=lambda name: pytest.fail(f"not standard JSON: {name}"),
    )
    assert report["after"]["perplexity"] is None
    assert "| inf | inf |" in (out / "README.md").read_text(encoding="utf-8")
