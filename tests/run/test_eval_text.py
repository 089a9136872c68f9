"""``eval --text``: perplexity with and without a stride, its interval, bits per byte."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from commands import fail, succeed
from transformers import AutoModelForCausalLM, AutoTokenizer

import frugal_bonsai

EXAMPLE = Path(frugal_bonsai.__file__).parent / "example"
WINDOW, WINDOWS = 32, 5


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "notes.txt"
    line = "Return the number {0} \u2013 of the files that were opened, or None if there are {0}.\n"
    file.write_text("".join(line.format(n) for n in range(40)), encoding="utf-8")
    return file


@pytest.mark.parametrize("stride", [None, 8])
@torch.no_grad()
def test_perplexity_is_that_of_transformers(text: Path, stride: int | None) -> None:
    """With a stride as in transformers' guide: each token counts in the first window with it."""
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32)
    tokenizer, step = AutoTokenizer.from_pretrained(EXAMPLE), stride or WINDOW
    tokens = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    sums, counts, seen = [], [], 0
    for start in range(0, WINDOWS * step, step):
        window = torch.tensor([tokens[start : start + WINDOW]])
        chances = model(window).logits[0, :-1].double().log_softmax(-1)
        losses = -chances.gather(1, window[0, 1:, None])[:, 0]
        new = losses if stride is None or start == 0 else losses[-stride:]
        seen = start + WINDOW
        sums.append(float(new.sum()))
        counts.append(len(new))
    total = sum(counts)
    nll = sum(sums) / total
    squares = sum((s - nll * c) ** 2 for s, c in zip(sums, counts, strict=True))
    error = math.sqrt(squares * WINDOWS / (WINDOWS - 1)) / total
    size = len(tokenizer.decode(tokens[:seen]).encode())

    words = ("--text", text, "--window", str(WINDOW), "--windows", str(WINDOWS))
    found = succeed("eval", "example", *words, *(("--stride", str(stride)) if stride else ()))
    assert (found["stride"], found["windows"], found["tokens"]) == (stride, WINDOWS, total)
    assert found["nll"] == pytest.approx(nll, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert found["perplexity_error"] == pytest.approx(math.exp(nll) * error, rel=1e-3)
    assert found["perplexity_low"] == pytest.approx(math.exp(nll - 1.96 * error), rel=1e-4)
    assert found["perplexity_high"] == pytest.approx(math.exp(nll + 1.96 * error), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) * seen / size, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ("--text", "stdlib", "--window", "64", "--stride", "64"),
            "--stride: 64 tokens is outside",
        ),
        (("--text", "stdlib", "--stride", "600"), "--stride: 600 tokens is outside 1..511"),
        (("--text", "stdlib", "--stride", "0"), "--stride: 0 tokens is outside 1..2047"),
        (("--tasks", "piqa", "--stride", "8"), "--stride is for --text"),
    ],
)
def test_refused_strides(words: tuple[str, ...], expected: str) -> None:
    assert expected in fail("eval", "example", *words)
