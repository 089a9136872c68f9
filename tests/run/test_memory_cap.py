"""The cap is hard: a checkpoint several times larger than its weights' share stays under it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import started, succeed
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LAYERS, HIDDEN, FFN = 16, 512, 1536
WEIGHT_ITEMS = ("layer buffers", "dequantised layer", "building the store", "head chunk")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, 200 MB in fp32, with a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("large") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = {chr(code): code - 64 for code in range(64, 128)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="@"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="@").save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_peak_memory_stays_under_the_cap(large: Path, tmp_path: Path) -> None:
    text = tmp_path / "letters.txt"
    text.write_text("thequickbrownfox" * 200, encoding="utf-8")
    words = (
        large,
        "--calibration",
        text,
        "--windows",
        "4",
        "--window",
        "64",
        "--masks",
        "2",
        "--mask-windows",
        "2",
        "--sparsity",
        "0.04",
    )
    free = succeed("plan", *words, run=started)
    base = next(i["size_bytes"] for i in free["items"] if i["name"] == "Python and libraries")
    cap = base + 150_000_000
    summary = succeed(
        "prune", *words, "--out", tmp_path / "out", "--max-cpu-mem", str(cap), run=started
    )
    memory = summary["memory"]
    weights = sum(i["size_bytes"] for i in memory["plan"] if i["name"] in WEIGHT_ITEMS)
    assert summary["before"]["weight_bytes"] > 4 * weights
    assert memory["host_cap_bytes"] == cap
    assert memory["host_peak_bytes"] <= cap
    assert memory["host_predicted_bytes"] == pytest.approx(memory["host_peak_bytes"], rel=0.1)
    assert memory["final_micro_batch"] == memory["planned_micro_batch"]
    assert summary["sparsity"] == pytest.approx(0.04, abs=0.01)


def test_a_cap_that_is_too_small_names_one_that_works(large: Path, tmp_path: Path) -> None:
    text = tmp_path / "letters.txt"
    text.write_text("thequickbrownfox" * 200, encoding="utf-8")
    words = ("plan", large, "--calibration", text, "--windows", "8", "--window", "64")
    refused = started(*words, "--max-cpu-mem", "300MB")
    assert refused.returncode == 2
    smallest = refused.stderr.split("that works is ")[1].split("MiB")[0].replace("\n", "")
    # The process's own size differs a little from one start to the next.
    enough = started(*words, "--max-cpu-mem", f"{int(smallest) + 32}MiB", "--json")
    assert enough.returncode == 0, enough.stderr
    assert json.loads(enough.stdout)["micro_batch"] >= 1
