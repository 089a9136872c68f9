"""The line after ``load:`` runs as it is: imports, model and tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import python
from commands_here import here

TRY = """
ids = tokenizer("def load(path):", return_tensors="pt").input_ids
made = model.generate(ids, max_new_tokens=4, do_sample=False)
print(made.shape[1] - ids.shape[1], sum(p.numel() for p in model.parameters()))
"""
WORDS = ("prune", "example", "--sparsity", "0.2", "--method", "magnitude", "--no-report")
TEXT = ("--window", "64", "--windows", "8", "--max-cpu-mem", "3GB")


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_the_printed_line_runs_as_it_is(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = here(*WORDS, *TEXT, "--layout", layout, "--out", "it's here")
    [line] = [text for text in printed.splitlines() if text.startswith("load:  ")]
    made, parameters = python(line.removeprefix("load:  ") + TRY).split()[-2:]
    assert made == "4" and 2_000_000 < int(parameters) < 3_443_136


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    import shutil

    from frugal_bonsai.checkpoint.locate import find_model
    from frugal_bonsai.text.windows import TOKENIZER_FILES

    here(*WORDS, *TEXT, "--out", tmp_path / "pruned")
    shutil.copytree(find_model("example"), tmp_path / "bare")
    for name in TOKENIZER_FILES:
        (tmp_path / "bare" / name).unlink(missing_ok=True)
    mask = ("--mask", tmp_path / "pruned" / "pruning_mask.json")
    printed = here("shrink", tmp_path / "bare", *mask, "--out", tmp_path / "out")
    assert printed.rstrip().endswith(f"AutoModelForCausalLM.from_pretrained('{tmp_path}/out')")
