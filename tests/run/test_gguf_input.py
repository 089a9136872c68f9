"""Every command takes a GGUF file: what it does equals what it does with the same folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fail, forked_python, python, succeed
from safetensors.torch import load_file

import frugal_bonsai
from frugal_bonsai.checkpoint.locate import find_model
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.from_gguf.open import open_gguf

TEXT = "Once upon a time there was a little girl who had a red ball. " * 60
QUICK = ("--windows", "4", "--window", "64", "--method", "local-only", "--sparsity", "0.3")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the embedded example as GGUF files, and a text."""
    folder = tmp_path_factory.mktemp("gguf")
    for dtype in ("bf16", "q8_0"):
        frugal_bonsai.export_gguf("example", folder / f"{dtype}.gguf", dtype=dtype)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pruned(files: Path) -> dict[str, Any]:
    """The summary of a prune of the bf16 file."""
    calibration = ("--calibration", files / "text.txt", "--max-cpu-mem", "2GB")
    out = ("--out", files / "pruned")
    return succeed("prune", files / "bf16.gguf", *out, *calibration, *QUICK)


def test_inspect_and_plan(files: Path) -> None:
    dense = succeed("inspect", "example")
    found = succeed("inspect", files / "q8_0.gguf")
    assert found["kind"] == "model" and found["parameters"] == dense["parameters"]
    assert found["groups"] == dense["groups"] and dense["gguf"] is None
    facts = found["gguf"]
    assert facts["file"] == "q8_0.gguf" and facts["quantisation"] == "Q8_0"
    assert facts["file_bytes"] == (files / "q8_0.gguf").stat().st_size
    assert sum(facts["formats"].values()) == dense["parameters"] and "Q8_0" in facts["formats"]
    assert "(Q8_0): its weights are dequantised to bfloat16" in found["notes"][0]
    plan = succeed("plan", files / "q8_0.gguf", *QUICK, "--max-cpu-mem", "2GB")
    assert any("dequantised to bfloat16" in note for note in plan["notes"])


def test_a_prune_of_the_file_is_that_of_the_folder(
    files: Path, pruned: dict[str, Any], tmp_path: Path
) -> None:
    calibration = ("--calibration", files / "text.txt", "--max-cpu-mem", "2GB")
    dense = succeed("prune", "example", "--out", tmp_path / "out", *calibration, *QUICK)
    for when in ("before", "after"):
        assert pruned[when]["perplexity"] == dense[when]["perplexity"]
    expected = load_file(tmp_path / "out" / "model.safetensors")
    found = load_file(files / "pruned" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    config = json.loads((files / "pruned" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["LlamaForCausalLM"]


def test_plain_transformers_loads_the_output(files: Path, pruned: dict[str, Any]) -> None:
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("def main(): return 12345", return_tensors="pt").input_ids
made = model.generate(ids, max_new_tokens=3, do_sample=False)
print(model.dtype, ids.tolist()[0], made.shape[1] - ids.shape[1], tokenizer.eos_token_id)
"""
    dtype, *ids, new, end = forked_python(code, files / "pruned").replace(",", "").split()
    expected = frugal_bonsai.load_tokenizer(find_model("example"))
    assert dtype == "torch.bfloat16" and int(new) <= 3 and int(end) == expected.eos_token_id
    wanted = expected("def main(): return 12345").input_ids
    assert [int(piece.strip("[]")) for piece in ids] == wanted


def test_card_and_report_name_the_file(files: Path, pruned: dict[str, Any]) -> None:
    facts = pruned["provenance"]["gguf"]
    assert facts["file"] == "bf16.gguf" and facts["quantisation"] == "BF16"
    card = (files / "pruned" / "README.md").read_text()
    assert "come from the GGUF file `bf16.gguf`, named 'example'" in card
    assert "They were read as bfloat16." in card
    report = json.loads((files / "pruned" / "pruning_report.json").read_text())
    assert report["provenance"] == pruned["provenance"]


def test_eval(files: Path) -> None:
    words = ("--text", files / "text.txt", "--window", "64")
    perplexity = succeed("eval", files / "bf16.gguf", *words)["perplexity"]
    assert perplexity == succeed("eval", "example", *words)["perplexity"]
    quantised = succeed("eval", files / "q8_0.gguf", *words)["perplexity"]
    assert quantised == pytest.approx(perplexity, rel=0.02) and quantised != perplexity


def test_shrink_and_export_close_the_loop(
    files: Path, pruned: dict[str, Any], tmp_path: Path
) -> None:
    mask = files / "pruned" / "pruning_mask.json"
    words = ("--mask", mask, "--out", tmp_path / "small")
    shrunk = succeed("shrink", files / "q8_0.gguf", *words)
    assert shrunk["after"]["parameters"] == pruned["after"]["parameters"]
    succeed("export", tmp_path / "small", "--dtype", "bf16", "--out", tmp_path / "small.gguf")
    with open_gguf(tmp_path / "small.gguf") as read, Checkpoint.open(tmp_path / "small") as folder:
        assert read.tensors.keys() == folder.tensors.keys()
        for name in read.tensors:
            assert torch.equal(read.read(name), folder.read(name)), name
    # A GGUF file is exported too: another number format, the same tokenizer.
    exported = succeed(
        "export", files / "q8_0.gguf", "--dtype", "f16", "--out", tmp_path / "f.gguf"
    )
    assert exported["tokenizer"] == "gpt2 (gpt-2)"
    with open_gguf(tmp_path / "f.gguf") as read, open_gguf(files / "q8_0.gguf") as source:
        keys = [key for key in source.header.metadata if key.startswith("tokenizer.")]
        assert {key: read.header.metadata[key] for key in keys} == {
            key: source.header.metadata[key] for key in keys
        }
        for name in source.tensors:
            torch.testing.assert_close(read.read(name), source.read(name).half())


def test_a_teacher(files: Path, pruned: dict[str, Any], tmp_path: Path) -> None:
    words = ("--data", files / "text.txt", "--window", "64", "--windows", "8", "--tokens", "1k")
    teacher = ("--teacher", files / "q8_0.gguf", "--max-cpu-mem", "3GB")
    found = succeed("adapt", files / "pruned", *teacher, *words, "--out", tmp_path / "out")
    assert found["teacher"] == str(files / "q8_0.gguf")
    assert found["provenance"]["gguf"] == pruned["provenance"]["gguf"]
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_bench(files: Path) -> None:
    quick = ("--prompt-tokens", "8", "--new-tokens", "2", "--repeat", "1", "--threads", "1")
    found = succeed("bench", files / "q8_0.gguf", "example", *quick)
    assert found["dense"]["parameters"] == found["pruned"]["parameters"]


def test_a_folder_with_one_file_and_with_two(files: Path, tmp_path: Path) -> None:
    shutil.copy(files / "q8_0.gguf", tmp_path / "a.gguf")
    assert succeed("inspect", tmp_path)["gguf"]["file"] == "a.gguf"
    shutil.copy(files / "q8_0.gguf", tmp_path / "b.gguf")
    said = fail("plan", tmp_path)
    assert "holds 2 GGUF files (a.gguf, b.gguf)" in said and "name one of them" in said
    assert succeed("inspect", tmp_path)["kind"] == "gguf"


def test_what_a_header_shows_is_known_before_torch_is_imported(files: Path) -> None:
    code = """
import sys
from pathlib import Path
from frugal_bonsai.run.early import check_export
check_export(sys.argv[1], Path(sys.argv[1]).with_name("new.gguf"))
print("torch" in sys.modules, "transformers" in sys.modules)
"""
    assert python(code, files / "q8_0.gguf").split() == ["False", "False"]


def test_a_truncated_file(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes((files / "q8_0.gguf").read_bytes()[:-1000])
    prune = ("prune", path, "--out", tmp_path / "out", "--calibration", files / "text.txt")
    for words in (("inspect", path), ("plan", path), prune):
        said = fail(*words)
        assert f"{path}: truncated: tensor " in said and "download it again" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="load_pruned reads folders"):
        frugal_bonsai.load_pruned(files / "q8_0.gguf")
