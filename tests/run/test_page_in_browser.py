"""The pages in headless Chromium: no sideways scrolling at 400 pixels, both colour schemes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from frugal_bonsai.report.pages.figures import draw_figures
from frugal_bonsai.report.pages.page import make_page, make_section, render_html

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, to look at the page")
# Added by this test alone: a page has no script.
MEASURE = """<script>
const style = element => getComputedStyle(element);
document.title = JSON.stringify({
  width: innerWidth, page: document.documentElement.scrollWidth,
  ink: style(document.body).color, paper: style(document.body).backgroundColor,
  text: style(document.querySelector("svg text")).fill,
  figures: [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().width),
});
</script></body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A crowded page: 80 layers, long words, every kind of chart."""
    pytest.importorskip("matplotlib")
    layers = [str(layer) for layer in range(80)]
    charts = {
        "kept": {
            "kind": "heat",
            "rows": ["KV groups", "FFN channels"],
            "columns": layers,
            "values": [[0.5] * 80, [0.25] * 80],
            "x": "layer",
        },
        "lines": {
            "kind": "lines",
            "series": {"a": [[1, 2.0], [2, 200.0]]},
            "logarithmic": True,
            "x": "round",
            "y": "perplexity",
        },
        "bars": {
            "kind": "bars",
            "labels": ["a phase with a long name", "another"],
            "parts": {"planned": [1.0, 2.0]},
            "marks": {"measured": [0.5, None]},
            "levels": {"cap": 3.0},
            "x": "GiB",
        },
    }
    charts = {name: {"caption": "A caption.", **chart} for name, chart in charts.items()}
    rows = [("a-file-name-without-any-space-" * 4, "value", *layers[:12])] * 30
    section = make_section("Section", [""] * 14, rows, figures=tuple(charts))
    commands = ["frugal-bonsai eval " + "a-long-name-" * 20]
    made = make_page(
        "name-" * 30, [section], version="0", charts=charts, commands=commands, lead=["x" * 90]
    )
    path = tmp_path_factory.mktemp("page") / "page.html"
    text = render_html(made, draw_figures(made["charts"]))
    assert "<script" not in text
    path.write_text(text.replace("</body>", MEASURE), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_a_crowded_page_fits_its_window(page: Path, width: int, dark: bool) -> None:
    assert CHROMIUM is not None
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    words += [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},2000"]
    words += ["--force-dark-mode"] * dark
    done = subprocess.run([*words, page.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    found = json.loads(title[1].replace("&quot;", '"'))
    assert found["page"] <= found["width"] and abs(found["width"] - width) <= 100
    assert len(found["figures"]) == 3
    assert all(size <= found["width"] for size in found["figures"][1:])
    light = {"ink": "rgb(29, 35, 41)", "paper": "rgb(255, 255, 255)"}
    night = {"ink": "rgb(228, 232, 236)", "paper": "rgb(21, 25, 29)"}
    expected = night if dark else light
    assert {key: found[key] for key in expected} == expected
    assert found["text"] == found["ink"]
