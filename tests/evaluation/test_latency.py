"""What is timed: one forward over the prompt, then one a token."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama

from frugal_bonsai.errors import OptionError
from frugal_bonsai.evaluation.latency import LlamaCppModel, TransformersModel


def test_a_prompt_is_read_once_and_tokens_are_made_one_by_one(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m").hugging_face()
    shapes: list[tuple[int, int]] = []
    made: list[int] = []
    forward = model.forward

    def spy(tokens: torch.Tensor, **options: Any) -> Any:
        result = forward(tokens, **options)
        shapes.append((tokens.shape[1], result.logits.shape[1]))
        made.append(int(tokens[0, -1]))
        return result

    model.forward = spy
    prompt = [5, 9, 13, 21]
    latency = TransformersModel(model).run(prompt, 6)
    # The head for one position alone; no token is computed twice.
    assert shapes == [(4, 1), *[(1, 1)] * 6]
    assert latency.prefill_seconds > 0 and latency.decode_seconds > 0
    model.forward = forward
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    assert made[1:] == expected[0, 4:].tolist()


def test_without_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(OptionError, match=r"pip install -e '\.\[llama-cpp\]'"):
        LlamaCppModel(tmp_path / "m.gguf", 8, 1)
