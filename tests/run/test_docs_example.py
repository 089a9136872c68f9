"""The notebook of the documentation runs, and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

from commands import forked_python

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "examples" / "prune_and_look.py"


def test_the_notebook_runs_from_plan_to_page(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; from frugal_bonsai.run import profile; profile._QUICK_SECONDS = 0.0; "
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    text = forked_python(code, SCRIPT, tmp_path)
    assert re.search(r"peak: \d+ MB, about \d+ s\n", text)
    assert "before: 3,443,136 parameters" in text
    assert text.count("layer ") >= 6 and "perplexity of other text: " in text
    assert "Return the number of" in text and "# example, 30.2% removed" in text
    assert (tmp_path / "pruned" / "run.toml").is_file()
