"""``prune --layout``: what each layout's command leaves behind, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import python, succeed

QUICK = ("--windows", "6", "--window", "64", "--masks", "2", "--mask-windows", "2")

PLAIN = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
made = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False)
zeros = sum(int((t == 0).sum()) for t in load_file(sys.argv[1] + "/model.safetensors").values())
print(json.dumps({"type": model.config.model_type, "zeros": zeros, "made": made.shape[1],
                  "parameters": sum(p.numel() for p in model.parameters())}))
"""


def test_padded_is_what_per_layer_is_and_loads_everywhere(tmp_path: Path) -> None:
    words = ("prune", "example", "--sparsity", "0.3", "--step", "0.15", *QUICK)
    cap = ("--max-cpu-mem", "2GB")
    padded = succeed(*words, *cap, "--layout", "padded", "--out", tmp_path / "padded")
    ragged = succeed(*words, *cap, "--layout", "per-layer", "--out", tmp_path / "ragged")
    # The same search, the same function.
    assert padded["kept"] == ragged["kept"]
    assert padded["sparsity"] == pytest.approx(0.3, abs=0.01)
    assert padded["sparsity"] == pytest.approx(ragged["sparsity"])
    assert padded["verify"]["max_relative_difference"] <= 1e-4
    perplexity = ragged["after"]["perplexity"]
    assert padded["after"]["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    # What is stored is counted as stored.
    found = json.loads(python(PLAIN, tmp_path / "padded").splitlines()[-1])
    assert found["type"] == "llama" and found["made"] == 8
    assert found["parameters"] == padded["after"]["parameters"] > ragged["after"]["parameters"]
    filled = padded["after"]["parameters"] - ragged["after"]["parameters"]
    assert filled <= found["zeros"] < filled + 0.01 * found["parameters"]
    stored = padded["after"]["block_parameters"] / padded["before"]["block_parameters"]
    card = (tmp_path / "padded" / "README.md").read_text(encoding="utf-8")
    assert f"{1 - stored:.1%} are really gone" in card and "no custom code" in card
    assert "AutoModelForCausalLM" in padded["load"]
