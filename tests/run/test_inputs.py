"""What people have on their disks: every command says the same of it, at once."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fail, succeed
from hostile.folders import gguf_bytes
from safetensors.torch import load_file, save_file
from tiny_models import relative
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
)

import frugal_bonsai
from frugal_bonsai.checkpoint.locate import find_model
from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.mask_file import write_mask
from frugal_bonsai.run.open import open_model
from frugal_bonsai.text.windows import load_tokenizer

TEXT = "Once upon a time there was a little girl who had a red ball. " * 40


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the embedded example."""
    shutil.copytree(find_model("example"), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(content), encoding="utf-8")


def commands(model: Path, tmp_path: Path) -> list[tuple[str | Path, ...]]:
    """Every command that takes a model, with all else as it must be."""
    out, text, mask = ("--out", tmp_path / "out"), tmp_path / "a.txt", tmp_path / "mask.json"
    text.write_text(TEXT, encoding="utf-8")
    write_half(Path(find_model("example")), mask)
    return [
        ("prune", model, *out, "--calibration", text),
        ("plan", model),
        ("eval", model, "--text", text),
        ("shrink", model, "--mask", mask, *out),
        ("export", model, *out),
        ("adapt", model, "--teacher", "example", "--data", text, *out),
        ("adapt", "example", "--teacher", model, "--data", text, *out),
        ("bench", "example", model),
    ]


def write_half(model: Path, mask: Path) -> None:
    """Write a mask that keeps half of each group."""
    with open_model(str(model)) as opened:
        keep = KeepMask(opened.spec.table)
        for group in opened.spec.table.groups:
            keep.of(group)[group.count // 2 :] = False
        write_mask(mask, "model", opened.spec, keep)


def test_every_command_refuses_what_is_no_model(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    for words in commands(model, tmp_path):
        said = fail(*words)
        assert "cloned without Git LFS" in said and "lfs pull" in said, words
    assert not (tmp_path / "out").exists()
    described = succeed("inspect", model)
    assert described["kind"] == "lfs-pointer" and "lfs pull" in described["advice"]
    with pytest.raises(CheckpointError, match="cloned without Git LFS"):
        frugal_bonsai.load_pruned(model)


def test_every_command_refuses_a_file_by_what_it_is(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mmproj.gguf").write_bytes(gguf_bytes("mmproj", "clip"))
    for words in commands(tmp_path / "mmproj.gguf", tmp_path):
        assert "not a language model; name the GGUF file of its language" in fail(*words), words
    assert succeed("inspect", tmp_path / "mmproj.gguf")["kind"] == "gguf"


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"rms_norm_eps": "1e-05"}, "rms_norm_eps"),
        ({"layer_types": ["full_attention"] * 9}, "layer_types"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"hidden_act": "nonsense"}, "hidden_act"),
        ({"attention_dropout": "no"}, "attention_dropout"),
    ],
    ids=["eps", "layer types", "rope", "activation", "dropout"],
)
def test_a_config_that_transformers_refuses_is_one_error_everywhere(
    model: Path, tmp_path: Path, values: dict[str, Any], key: str
) -> None:
    edit(model / "config.json", **values)
    if values.get("rope_parameters", 0) is None:
        config = json.loads((model / "config.json").read_text())
        del config["rope_parameters"]
        (model / "config.json").write_text(json.dumps(config))
    said = {fail(*words) for words in commands(model, tmp_path) if words[0] != "bench"}
    said.add(fail("inspect", model))
    assert len(said) == 1, said
    assert "config.json: " in said.copy().pop() and key in said.pop()


def test_perplexity_with_a_padding_index_is_plain_transformers(model: Path, text: Path) -> None:
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    edit(model / "config.json", pad_token_id=rows - 1)
    found = succeed("eval", model, "--text", text, "--window", "64", "--windows", "4")
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = load_tokenizer(model)(TEXT, add_special_tokens=False, return_tensors="pt").input_ids
    windows_NS = tokens[0, : 4 * 64].view(4, 64)
    with torch.no_grad():
        loss = float(plain(windows_NS, labels=windows_NS).loss)
    assert math.isclose(found["perplexity"], math.exp(loss), rel_tol=1e-5)


def test_a_padding_index_that_transformers_refuses_is_named(model: Path, text: Path) -> None:
    edit(model / "config.json", pad_token_id=100_000)
    said = fail("eval", model, "--text", text, "--window", "64", "--windows", "1")
    assert "config.json: " in said and "pad_token_id is 100000" in said


def add_token(model: Path, content: str = "[PAD]") -> int:
    """Add a token behind the embedding's rows, as many tokenizers of derived models have it."""
    number: int = json.loads((model / "config.json").read_text())["vocab_size"]
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    token = {"id": number, "content": content, "special": True, **flags}
    tokenizer["added_tokens"].append(token)
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    assert load_tokenizer(model).convert_tokens_to_ids(content) == number
    return number


def test_a_token_without_an_embedding_row(model: Path, text: Path, tmp_path: Path) -> None:
    number = add_token(model)
    words = ("eval", model, "--window", "64", "--text")
    succeed(*words, text)  # its id is never used
    text.write_text(f"{TEXT} [PAD] {TEXT}", encoding="utf-8")
    said = fail(*words, text)
    for piece in ("'[PAD]'", str(number), f"vocabulary of {number}", "text.txt"):
        assert piece in said
    succeed(*words, text, "--windows", "2")  # it lies behind the windows
    quick = ("--window", "64", "--max-cpu-mem", "2GB", "--out", tmp_path / "out")
    assert "'[PAD]'" in fail("prune", model, "--calibration", text, *quick)
    said = fail("adapt", model, "--data", text, "--loss", "lm", *quick)
    assert "'[PAD]'" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["quantization_config", "quantization"])
def test_a_left_over_description_of_quantisation_goes_with_a_note(
    model: Path, text: Path, tmp_path: Path, key: str
) -> None:
    edit(model / "config.json", **{key: {"quant_method": "gptq", "bits": 4, "group_size": 128}})
    assert any(key in note for note in succeed("inspect", model)["notes"])
    write_half(model, tmp_path / "mask.json")
    summary = succeed("shrink", model, "--mask", tmp_path / "mask.json", "--out", tmp_path / "out")
    assert any(key in note for note in summary["notes"])
    assert key not in json.loads((tmp_path / "out" / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = succeed("eval", model, "--text", text, "--window", "64", "--windows", "1")
    assert any(key in note for note in found["notes"])
    loaded = frugal_bonsai.load_pruned(model)  # plain transformers asks for GPTQ's package
    assert not hasattr(loaded.config, "quantization_config")


def follow_advice(path: Path) -> str:
    """Run the command that ``inspect`` names for a path; return the path's kind."""
    described = succeed("inspect", path)
    exec(described["command"].split('python -c "')[1].rsplit('"', 1)[0], {})
    return str(described["kind"])


def logits(folder: Path) -> torch.Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return loaded(torch.arange(3, 40)[None]).logits


def test_the_command_that_dequantises_works(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = AutoModelForCausalLM.from_pretrained(model, quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    load_tokenizer(model).save_pretrained(tmp_path / "packed")
    assert follow_advice(tmp_path / "packed") == "quantised"
    plain = tmp_path / "packed-bf16"
    assert succeed("inspect", plain)["notes"] == []
    assert 0 < relative(logits(plain), logits(model)) < 0.5


def test_the_command_that_merges_an_adapter_works(model: Path, tmp_path: Path) -> None:
    import peft

    base = AutoModelForCausalLM.from_pretrained(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    assert succeed("inspect", tmp_path / "adapter")["base_model"] == str(model)
    assert follow_advice(tmp_path / "adapter") == "adapter"
    merged = tmp_path / "adapter-merged"
    assert succeed("inspect", merged)["kind"] == "model"
    load_tokenizer(merged)
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (load_file(f / "model.safetensors")[name] for f in (model, merged))
    assert not torch.equal(before, after)


def test_a_tied_head_alone_is_pruned_and_loads(model: Path, text: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    expected = succeed("eval", model, "--text", text, "--window", "64", "--windows", "1")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    found = succeed("eval", model, "--text", text, "--window", "64", "--windows", "1")
    assert found["perplexity"] == expected["perplexity"]
    import gguf

    succeed("export", model, "--out", tmp_path / "m.gguf")
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert "token_embd.weight" in names and "output.weight" not in names
