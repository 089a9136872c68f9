"""The embedded example model: loads plainly, stays small, and has learnt its language."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

import frugal_bonsai
from frugal_bonsai.text import stdlib

FOLDER = Path(frugal_bonsai.__file__).parent / "example"
WINDOW_TOKENS = 256


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def held_out_windows(tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
    """Cut the held-out text into the windows of tools/train_example_model.py."""
    tokens = tokenizer(stdlib.held_out_text(), verbose=False).input_ids
    stream = torch.tensor([tokenizer.bos_token_id, *tokens])
    return stream[: len(stream) // length * length].view(-1, length)


def test_folder_is_within_8_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 8_000_000


def test_model_is_a_small_llama_in_bf16(model: LlamaForCausalLM) -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llama"
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    assert (config["hidden_size"], config["head_dim"]) == (192, 32)
    assert 2_000_000 <= model.num_parameters() <= 4_000_000


def test_tokenizer_is_lossless(tokenizer: PreTrainedTokenizerBase) -> None:
    text = (
        "def f(x):\n\treturn  'é☃\U0001f333 \t\n\n'  # don't .\r\n" + stdlib.held_out_text()[:5000]
    )
    tokens = tokenizer(text, verbose=False).input_ids
    assert tokenizer.decode(tokens) == text
    assert len(tokenizer) == 4096 and max(tokens) < 4096
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.encode("<|endoftext|>") == [0]


@torch.no_grad()
def test_held_out_perplexity_is_clearly_below_the_5_gram_s(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """On these windows tools/ngram_baseline.py gives the 5-gram 77.9, and this model 22.5.

    Both figures are for the text of Python 3.11; the model's is 21.4 to 22.9 for 3.10 to 3.13.
    """
    windows_WT = held_out_windows(tokenizer, WINDOW_TOKENS)[::8]
    logits = model(windows_WT[:, :-1], use_cache=False).logits
    perplexity = math.exp(F.cross_entropy(logits.flatten(0, 1), windows_WT[:, 1:].flatten()).item())
    assert perplexity < 35


@torch.no_grad()
def test_all_512_positions_are_of_use(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Late tokens of a window of 512 are not harder than those of its second quarter."""
    windows_WT = held_out_windows(tokenizer, 2 * WINDOW_TOKENS)[::16]
    logits = model(windows_WT[:, :-1], use_cache=False).logits
    nll_WT = F.cross_entropy(logits.transpose(1, 2), windows_WT[:, 1:], reduction="none")
    assert nll_WT[:, 256:].mean() < nll_WT[:, 128:256].mean() + 0.1


def test_generation_stays_in_the_vocabulary_and_ends(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = tokenizer("def main():\n    ", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(output[0])
    assert text.startswith("def main():\n    ") and len(text) > len("def main():\n    ")
