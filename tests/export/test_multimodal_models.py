"""The text model inside a model of images and text, exported: llama.cpp gives the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from multimodal_models import WHOLES, save_whole
from tiny_models import random_windows, save_pair_tokenizer

from export.llama_cpp import assert_same_next_tokens, needs_llama_cpp
from frugal_bonsai.run.export import export_gguf


@needs_llama_cpp
@pytest.mark.parametrize(
    ("kind", "architecture", "within"),
    [("gemma3", "gemma3", 5e-3), ("mistral3", "llama", 1e-4), ("qwen2_5_vl", "qwen2", 1e-4)],
)
def test_text_model_in_llama_cpp(
    kind: str, architecture: str, within: float, tmp_path: Path
) -> None:
    text = {**WHOLES[kind]["text_config"], "vocab_size": 512, "max_position_embeddings": 128}
    save_whole(tmp_path / "dense", kind, seed=4, text_config=text)
    save_pair_tokenizer(tmp_path / "dense")
    summary = export_gguf(str(tmp_path / "dense"), tmp_path / "m.gguf", dtype="f32")
    assert summary["architecture"] == architecture
    assert "is left aside" in summary["notes"][0]
    prompt = random_windows(1, 60, vocabulary=280)[0].tolist()  # no token stands for an image
    assert_same_next_tokens(
        tmp_path / "dense", tmp_path / "m.gguf", text=prompt, first=3, within=within
    )
