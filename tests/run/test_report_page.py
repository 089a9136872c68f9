"""The page of a pruned model: the report's figures, nothing outside, clear errors."""

from __future__ import annotations

import json
import re
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commands import fail

import frugal_bonsai.run.report as report
from frugal_bonsai.progress import Silent
from frugal_bonsai.report.pages import figures
from frugal_bonsai.run.report import report_page, write_page


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A folder with a report such as prune writes."""
    kept, dense = {"attention": [3, 4], "ffn": [192, 320]}, {"attention": [4, 4], "ffn": [512, 512]}
    sizes = {"parameters": 3443136, "block_parameters": 2656512, "weight_bytes": 6886272}
    row = {"round": 1, "observations": 32, "r2": 0.87, "tau": 0.79, "certainty": 1.0}
    summary = {
        "version": "0.1.0",
        "model": "<script>x",
        "layout": "uniform",
        "method": "default",
        "settings": {"seed": 17},
        "calibration": {"source": "stdlib"},
        "kept": kept,
        "dense": dense,
        "layer_sparsity": [0.5, 0.25],
        "rounds": [
            {**row, "sparsity": 0.25, "perplexity": 9.97, "seconds": 4.5, "forward_tokens": 192512}
        ],
        "forward_tokens": 1333680,
        "seconds": 115.8,
        "sparsity": 0.375,
        "memory": {
            "host_cap_bytes": 2 * 10**9,
            "host_predicted_bytes": 1933071334,
            "host_peak_bytes": 1476882432,
            "gpu_peak_bytes": None,
            "plan": [{"name": "hidden states", "where": "host", "size_bytes": 576 * 2**20}],
        },
        "notes": ["read from /home/someone/secret/model"],
        "load": f"AutoModelForCausalLM.from_pretrained('{tmp_path}')",
        "before": {**sizes, "perplexity": 9.0393},
        "after": {**sizes, "parameters": 2116032, "perplexity": 12.2908},
    }
    (tmp_path / "pruning_report.json").write_text(json.dumps(summary))
    return tmp_path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw figures, as no other test does (conftest.py)."""
    monkeypatch.setattr(report, "require_plots", figures.require_plots)
    monkeypatch.setattr(report, "draw_figures", figures.draw_figures)


def test_html_has_the_figures_and_refers_to_nothing(output: Path) -> None:
    page = report_page(output)
    HTMLParser().feed(page)
    for text in ("9.039", "12.291", "1,333,680", "3 of 4", "192 of 512", "192,512", "576.00 MiB"):
        assert text in page
    assert "layer 0 (50.0%), layer 1 (25.0%)" in page
    assert "<script" not in page and "&lt;script&gt;x" in page
    assert not re.search(r"""(src|href)=["'](?!#)""", page)
    assert "/home/" not in page and str(output) not in page


def test_figures_are_the_same_each_time(output: Path, drawn: None) -> None:
    pytest.importorskip("matplotlib")
    page = report_page(output)
    assert page.count("<svg") == 2 and page == report_page(output)
    assert "#010203" not in page and "currentColor" in page  # the page's ink, light or dark
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert {name.split("-")[0] for name in ids} >= {"kept", "plan"}


def test_markdown_and_json(output: Path) -> None:
    assert "| 0 | 3 of 4 | 192 of 512 | 50.0% |" in report_page(output, kind="md")
    page = json.loads(report_page(output, kind="json"))
    load = f"AutoModelForCausalLM.from_pretrained({output.name!r})"
    assert shlex.split(page["commands"][0]) == ["python", "-i", "-c", load]
    assert page["charts"]["kept"]["rows"] == ["KV groups", "FFN channels"]
    assert page["charts"]["kept"]["values"][1] == [0.375, 0.625]


def test_only_a_page_is_replaced_unless_asked(output: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("mine", encoding="utf-8")
    text = fail("report", output, "--out", mine)
    assert "mine.html: exists and is no page" in text and "--overwrite" in text
    assert mine.read_text(encoding="utf-8") == "mine"
    write_page(mine, report_page(output), overwrite=True)
    write_page(mine, report_page(output, kind="md"))
    assert mine.read_text(encoding="utf-8").startswith("<!-- frugal-bonsai report -->\n# ")


def test_a_finished_prune_never_fails_for_its_page(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Notes(Silent):
        text = ""

        def note(self, text: str) -> None:
            self.text += text

    def fail_to_draw(charts: object) -> None:
        raise RuntimeError("no figure")

    notes = Notes()
    monkeypatch.setattr(report, "draw_figures", fail_to_draw)
    report.write_page_beside(output, notes)
    assert notes.text == "no report.html: RuntimeError: no figure"
    monkeypatch.setattr(report, "require_plots", figures.require_plots)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.write_page_beside(output, notes)
    assert "pip install 'frugal-bonsai[plots]', then frugal-bonsai report" in notes.text
    assert not (output / "report.html").exists()


def test_errors_say_what_to_do(
    output: Path, tmp_path: Path, drawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no such folder" in fail("report", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "finished prune or adapt" in fail("report", tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'frugal-bonsai[plots]'" in fail("report", output)


def test_the_measured_peak_is_split_into_the_process_and_the_work(output: Path) -> None:
    path = output / "pruning_report.json"
    summary = json.loads(path.read_text())
    items = (("hidden states", 600), ("Python and libraries", 400), ("norms", 1))
    summary["memory"] |= {
        "host_peak_bytes": 900 * 2**20,
        "plan": [{"name": n, "where": "host", "size_bytes": s * 2**20} for n, s in items],
    }
    path.write_text(json.dumps(summary))
    parts = json.loads(report_page(output, kind="json"))["charts"]["plan"]["parts"]
    planned, measured = ({name: pair[at] for name, pair in parts.items()} for at in (0, 1))
    assert planned == {**dict(items), "work, measured": 0.0}
    assert measured == {**dict.fromkeys(dict(items), 0.0), "Python and libraries": 400.0} | {
        "work, measured": 500.0
    }
