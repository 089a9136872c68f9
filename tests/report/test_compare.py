"""Several results on one page: what compares, and what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from summaries import make_summary

from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.report.pages import figures
from frugal_bonsai.run.report import report_page


def write(folder: Path, name: str, **changes: Any) -> Path:
    """An output with a report such as prune writes."""
    out = folder / name
    out.mkdir()
    (out / "pruning_report.json").write_text(json.dumps(make_summary(**changes)))
    return out


@pytest.fixture
def outputs(tmp_path: Path) -> list[Path]:
    settings = {"sparsity": 0.5, "level": "none", "recovery": True, "seed": 17}
    return [
        write(tmp_path, "half"),
        write(tmp_path, "local", method="local-only", settings=settings, sparsity=0.3),
    ]


def test_results_stand_side_by_side(outputs: list[Path]) -> None:
    page = json.loads(report_page(*outputs, kind="json"))
    table, settings = page["sections"]
    assert table["rows"][0][:4] == ["1", "half", "prune, default", "50.0%"]
    assert table["rows"][1][1:4] == ["local", "prune, local-only", "30.0%"]
    assert table["rows"][0][-2:] == ["6.250", "12.500"]  # of the evaluation text of both
    assert "notes.txt, window 256" in table["text"] and page["notes"] == []
    assert settings["rows"] == [["level", "group", "none"]]
    removed, tokens, parameters = page["charts"]["perplexity"]["panels"]
    assert removed["groups"]["prune, local-only"] == [[30.0, 12.5, "2"]]
    assert removed["groups"]["dense"] == [[0.0, 6.25]]
    assert tokens["groups"]["prune, default"][0][0] == pytest.approx(162.469134)
    assert parameters["groups"]["dense"][0][0] == pytest.approx(6738.415616)


def test_settings_that_one_result_alone_has_are_not_listed(tmp_path: Path) -> None:
    left = write(tmp_path, "left", settings={"seed": 1, "rank": 4})
    right = write(tmp_path, "right", settings={"seed": 2})
    page = json.loads(report_page(left, right, kind="json"))
    assert page["sections"][1]["rows"] == [["seed", "1", "2"]]


def test_different_texts_are_said_not_to_compare(outputs: list[Path], tmp_path: Path) -> None:
    text = {"name": "file other.txt", "window": 256, "windows": 40}
    other = write(tmp_path, "other", eval_text=text)
    page = report_page(*outputs, other, kind="md")
    assert "do not compare" not in page  # all have the same held-out windows
    calibration = {**make_summary()["calibration"], "source": "c4"}
    another = write(tmp_path, "another", eval_text=None, calibration=calibration, model="org/b")
    page = report_page(*outputs, another, kind="md")
    assert "do not compare" in page and "the same dense model" in page


def test_the_figure_is_drawn_and_errors_name_the_folder(
    outputs: list[Path], tmp_path: Path
) -> None:
    assert "2 results side by side" in report_page(*outputs, kind="md")
    with pytest.raises(CheckpointError, match="absent: no such folder"):
        report_page(*outputs, tmp_path / "absent")
    pytest.importorskip("matplotlib")
    page = json.loads(report_page(*outputs, kind="json"))
    assert figures.draw_figures(page["charts"])["perplexity"].count("prune, local-only") == 1
