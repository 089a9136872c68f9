"""A loss beyond 709 nats, whose exp no float holds, ends neither a measurement nor a prune."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import frugal_bonsai, succeed
from rich.console import Console
from safetensors.torch import load_file, save_file

from frugal_bonsai.checkpoint.locate import find_model
from frugal_bonsai.plain_json import json_text
from frugal_bonsai.report.tables import render_prune
from frugal_bonsai.run.options import PruneOptions
from frugal_bonsai.run.prune import prune
from frugal_bonsai.stream.engine import Engine


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


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_prune_is_not_lost_to_a_model_that_overflows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: float
) -> None:
    """The losses of the model that was just written are not finite; those before are."""
    real = Engine.losses

    def losses(engine: Engine, stream: Any, tokens_NS: torch.Tensor, name: str) -> torch.Tensor:
        found = real(engine, stream, tokens_NS, name)
        return found.fill_(loss) if name.startswith("pruned") else found

    monkeypatch.setattr(Engine, "losses", losses)
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("Return the number of words. " * 60, encoding="utf-8")
    options = PruneOptions(
        method="local-only",
        settings={"sparsity": 0.2},
        windows=4,
        window=64,
        calibration="stdlib",
        eval_text=str(text),
    )
    summary = prune("example", out, options)
    assert math.isfinite(summary["before"]["perplexity"])
    assert summary["after"]["perplexity"] == summary["after"]["eval_perplexity"] == math.inf
    assert "to inf: train it with adapt" in " ".join(summary["warnings"])
    report = json.loads((out / "pruning_report.json").read_text(encoding="utf-8"))
    assert report["after"]["perplexity"] is None and report["after"]["perplexity_error"] is None
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.count("| inf |") == 2 and "held-out perplexity rose from" in card
    console = Console(file=io.StringIO(), width=80)
    render_prune(summary, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert [line.split()[-2] for line in shown.splitlines() if line.startswith("perplexity, ")] == [
        "inf",
        "inf",
    ]
