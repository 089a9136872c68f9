"""llama.cpp reads back the special tokens and chat templates that transformers resolves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from export.llama_cpp import complete_to_the_end, needs_llama_cpp
from export.test_llama_cpp import export
from frugal_bonsai.errors import CheckpointError

KINDS = ("bos", "eos", "unk", "pad")


@pytest.fixture
def folder(tmp_path: Path, stories260k: Path) -> Path:
    """A model whose files may be changed."""
    return Path(shutil.copytree(stories260k, tmp_path / "model"))


def change(folder: Path, name: str, **values: Any) -> None:
    """Set keys of a JSON file, which may be new; None removes a key."""
    path = folder / name
    now = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    now = {key: value for key, value in {**now, **values}.items() if value is not None}
    path.write_text(json.dumps(now), encoding="utf-8")


def written(folder: Path) -> dict[str, Any]:
    """Tokenizer keys of an exported file, without their prefix."""
    out = folder.parent / "m.gguf"
    export(folder, out)
    fields = GGUFReader(out).fields.items()
    prefix = "tokenizer."
    return {key.removeprefix(prefix): f.contents() for key, f in fields if key.startswith(prefix)}


def special_ids(keys: dict[str, Any]) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {kind: keys.get(f"ggml.{name}_token_id") for kind, name in names.items()}
    return {kind: at for kind, at in found.items() if at is not None}


def transformers_ids(folder: Path) -> dict[str, int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in KINDS}
    return {kind: at for kind, at in found.items() if at is not None}


@needs_llama_cpp
def test_special_tokens_map(folder: Path) -> None:
    """special_tokens_map.json names the tokens, tokenizer_config.json does not."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    change(folder, "tokenizer_config.json", **dict.fromkeys(names))
    change(folder, "special_tokens_map.json", **names)
    keys = written(folder)
    assert special_ids(keys) == transformers_ids(folder) == {"bos": 1, "eos": 2, "unk": 0}
    assert keys["ggml.add_bos_token"]
    _, found = complete_to_the_end(folder.parent / "m.gguf", "Once", 1)
    assert (found["bos_token"], found["eos_token"]) == ("<s>", "</s>")


@needs_llama_cpp
def test_a_template_file_comes_before_the_config(folder: Path) -> None:
    change(folder, "tokenizer_config.json", chat_template="CONFIG")
    assert written(folder)["chat_template"] == "CONFIG"
    (folder.parent / "m.gguf").unlink()
    (folder / "chat_template.jinja").write_text("JINJA")
    assert written(folder)["chat_template"] == "JINJA"
    assert AutoTokenizer.from_pretrained(folder).chat_template == "JINJA"
    _, found = complete_to_the_end(folder.parent / "m.gguf", "Once", 1)
    assert found["chat_template"] == "JINJA"


@pytest.mark.parametrize("files", [True, False])
def test_named_templates(folder: Path, files: bool) -> None:
    """Named templates are files, or a list in tokenizer_config.json."""
    if files:
        (folder / "chat_template.jinja").write_text("PLAIN")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS")
    else:
        named = {"default": "PLAIN", "tool_use": "TOOLS"}
        listed = [{"name": name, "template": text} for name, text in named.items()]
        change(folder, "tokenizer_config.json", chat_template=listed)
    keys = written(folder)
    assert keys["chat_template"] == "PLAIN"
    assert keys["chat_template.tool_use"] == "TOOLS"
    assert keys["chat_templates"] == ["tool_use"]


@pytest.fixture
def gpt2(tmp_path: Path, shared: Path) -> Path:
    """A GPT-2 that writes commas. Its tokenizer_config.json names no special token."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=511,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (shared / "text" / "tinystories_test.txt").read_text(encoding="utf-8")
    made.train_from_iterator([text[:60_000]], trainer)
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))
    comma = made.token_to_id(",")
    change(folder, "tokenizer_config.json", model_max_length=1024)
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=511, eos_token_id=511))
    with torch.no_grad():
        weight = model.transformer.wte.weight
        weight[comma] *= 6
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(weight[comma])
    model.save_pretrained(folder)
    return folder


@needs_llama_cpp
@pytest.mark.parametrize("tokenizer_class", [None, "PreTrainedTokenizerFast"])
def test_the_end_of_text_of_a_gpt2(gpt2: Path, tokenizer_class: str | None) -> None:
    """GPT2Tokenizer has a default end of text; for other classes config.json names it.

    Without an id in the file llama.cpp takes token 11, a comma, and stops there.
    """
    change(gpt2, "tokenizer_config.json", tokenizer_class=tokenizer_class)
    keys = written(gpt2)
    assert {"bos": 511, "eos": 511}.items() <= special_ids(keys).items()
    answer, found = complete_to_the_end(gpt2.parent / "m.gguf", "Once", 8)
    assert answer.text == "," * 8
    assert found["bos_token"] == found["eos_token"] == "<|endoftext|>"


@needs_llama_cpp
def test_every_token_that_ends_a_generation(gpt2: Path) -> None:
    """generation_config.json may list several tokens, and transformers stops at each."""
    comma = AutoTokenizer.from_pretrained(gpt2)(",").input_ids[0]
    change(gpt2, "generation_config.json", eos_token_id=[511, comma, 600])
    keys = written(gpt2)
    assert (keys["ggml.eos_token_id"], keys["ggml.eot_token_id"]) == (511, comma)
    assert "ggml.eom_token_id" not in keys  # 600 has no row of the embedding
    answer, _ = complete_to_the_end(gpt2.parent / "m.gguf", "Once", 8)
    assert answer.text == ","


def test_a_model_without_an_end_of_text(gpt2: Path) -> None:
    """The summary states where llama.cpp stops then."""
    change(gpt2, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    for name in ("config.json", "generation_config.json"):
        change(gpt2, name, bos_token_id=None, eos_token_id=None)
    [note] = export(gpt2, gpt2.parent / "m.gguf").notes
    assert "llama.cpp stops at token 11 (','); set eos_token_id in config.json" in note


def test_a_broken_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        export(folder, folder.parent / "m.gguf")


def test_ids_that_are_no_tokens(folder: Path) -> None:
    """Old Llama configs have a padding id of -1."""
    change(folder, "config.json", pad_token_id=-1)
    assert "pad" not in special_ids(written(folder))
