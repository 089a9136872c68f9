"""Warnings with what to do, and where a model comes from."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import frugal_bonsai, succeed
from plan_shapes import LLAMA_8B

from frugal_bonsai.bonsai.methods import make_settings
from frugal_bonsai.checkpoint.locate import find_model
from frugal_bonsai.run.adapt_output import _warnings as adaptation_warnings
from frugal_bonsai.run.open import open_model
from frugal_bonsai.run.provenance import read_provenance
from frugal_bonsai.run.warnings import (
    calibration_warning,
    figure_warnings,
    unfamiliar_text_warning,
)


def test_a_calibration_with_fewer_tokens_than_columns() -> None:
    settings = make_settings("default", {})
    text = calibration_warning(LLAMA_8B, settings, 4, 2048)
    assert text is not None and "8,192 tokens" in text and "at least 14,336" in text
    assert "--windows 7 or more" in text
    assert calibration_warning(LLAMA_8B, settings, 7, 2048) is None
    assert calibration_warning(LLAMA_8B, make_settings("random", {}), 1, 2048) is None


def test_inputs_of_attention_wider_than_any_output_projection() -> None:
    narrow = replace(LLAMA_8B, hidden=20_000)  # the Gram matrix of the refits of q, k, v, gate, up
    text = calibration_warning(narrow, make_settings("default", {}), 8, 2048)
    assert text is not None and "at least 20,000" in text
    outputs = make_settings("default", {"refit": "outputs"})
    assert calibration_warning(narrow, outputs, 8, 2048) is None


def test_a_text_that_the_model_does_not_know() -> None:
    text = unfamiliar_text_warning(462.7, 2.34)  # stories3M on WikiText-2
    assert text is not None and "3.8 bits for a byte" in text and "--calibration self" in text
    assert unfamiliar_text_warning(7.9, 3.77) is None  # stories3M on TinyStories
    assert unfamiliar_text_warning(3.1, 1.0) is None  # a model of bytes
    assert unfamiliar_text_warning(31.6, 4.0) is None
    assert unfamiliar_text_warning(31.6, 0.0) is None  # tokens without text


def test_prune_warns_of_a_text_that_the_model_does_not_know(tmp_path: Path) -> None:
    text = tmp_path / "numbers.txt"
    draw = random.Random(0)
    text.write_text(" ".join(str(draw.randrange(10**6)) for _ in range(4000)), encoding="utf-8")
    quick = ("--windows", "4", "--window", "64", "--level", "none", "--no-recovery")
    words = ("--out", tmp_path / "out", "--sparsity", "0.2", "--max-cpu-mem", "2GB", *quick)
    summary = succeed("prune", "example", "--calibration", text, *words)
    assert any("unlike what the model was trained on" in text for text in summary["warnings"])
    known = succeed("prune", "example", *words, "--overwrite")
    assert not any("unlike what" in text for text in known["warnings"])


def figures(perplexity: float | None, error: float | None = 0.01) -> dict[str, float | None]:
    return {"perplexity": perplexity, "perplexity_error": error, "eval_perplexity": None}


def test_figures_that_are_bad_or_uncertain() -> None:
    assert list(figure_warnings(figures(5.0), figures(24.0), advice="adapt")) == []
    (rose,) = figure_warnings(figures(5.0), figures(26.0), advice="adapt")
    assert rose == "held-out perplexity rose from 5 to 26: adapt"
    (rose,) = figure_warnings(figures(5.0), figures(float("inf"), None), advice="adapt")
    assert "rose from 5 to inf" in rose
    (few,) = figure_warnings(figures(5.0), figures(6.0, 0.9), advice="adapt")
    assert "standard error of 0.9" in few and "--eval-text or more --windows" in few


def test_an_adaptation_that_left_its_teacher() -> None:
    before = {**figures(22.5), "kl": 0.5}
    (moved,) = adaptation_warnings(before, {**figures(14.0), "kl": 0.75})
    assert "grew from 0.5 to 0.75 nats" in moved and "--tokens" in moved
    assert adaptation_warnings(before, {**figures(14.0), "kl": 0.25}) == []
    without = {**figures(22.5), "kl": None}
    assert adaptation_warnings(without, without) == []


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The example with a licence, pruned on 256 tokens, pruned again, and the second summary."""
    folder = tmp_path_factory.mktemp("twice")
    dense, summary = folder / "dense", dict[str, Any]()
    shutil.copytree(find_model("example"), dense)
    card = "---\nlicense: apache-2.0\nbase_model: org/dense-model\n---\n# Dense\n"
    (dense / "README.md").write_text(card, encoding="utf-8")
    quick = ("--calibration", "stdlib", "--windows", "4", "--window", "64")
    for source, out in ((dense, "once"), (folder / "once", "twice")):
        words = ("--out", folder / out, *quick, "--method", "local-only", "--sparsity", "0.2")
        summary = succeed("prune", source, *words)
    return folder, summary


def test_a_model_that_was_pruned_before(twice: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = twice
    before, calibration = summary["warnings"][:2]
    assert "once was pruned before, from dense: figures" in before
    assert calibration.startswith("calibration: 256 tokens")
    provenance = json.loads((folder / "twice" / "pruning_report.json").read_text())["provenance"]
    assert provenance == summary["provenance"]
    assert [step["model"] for step in provenance["steps"]] == ["dense", "once"]
    first, second = (step["perplexity"] for step in provenance["steps"])
    assert first[1] == pytest.approx(second[0], rel=1e-3)
    card = (folder / "twice" / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "org/dense-model" and head["license"] == "apache-2.0"
    assert "The dense ancestor is `dense`" in card and "## Warnings" in card
    assert str(folder) not in card


def test_what_wrote_no_report_is_known_by_its_mask(
    twice: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = twice
    shutil.copytree(folder / "once", tmp_path / "model")
    (tmp_path / "model" / "pruning_report.json").write_text("[" * 9, encoding="utf-8")
    with open_model(str(tmp_path / "model")) as opened:
        found = read_provenance(opened)
    assert found["dense"] == "dense" and [s["command"] for s in found["steps"]] == ["shrink"]


def test_eval_states_its_standard_error(twice: tuple[Path, dict[str, Any]]) -> None:
    words = ("--text", find_model("example") / "README.md", "--window", "64", "--windows", "4")
    done = frugal_bonsai("eval", twice[0] / "once", *words)
    assert done.returncode == 0 and "its standard error" in done.stdout
