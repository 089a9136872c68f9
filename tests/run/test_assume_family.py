"""``--assume-family``: architectures that follow a family's naming and have no table."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from commands import fail, frugal_bonsai, python
from safetensors.torch import load_file, save_file
from tiny_models import logits_like, save_byte_tokenizer, save_tiny

# Llama's tensors and arithmetic, another name: cwm has sliding windows and head_dim of its own.
CONFIG = {
    "vocab_size": 256,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "sliding_window": 5,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    letters = random.Random(0)
    path.write_text("".join(letters.choice("abcdefgh \n") for _ in range(2500)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assumed") / "cwm"
    save_tiny(folder, "cwm", **CONFIG)
    save_byte_tokenizer(folder)
    return folder


def test_it_runs_as_the_family_and_says_so_loudly(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--calibration", text, "--window", "32", "--windows", "16", "--tile", "1")
    done = frugal_bonsai(
        "prune", model, "--out", out, "--assume-family", "llama", "--sparsity", "0.2",
        "--step", "0.2", "--masks", "2", "--mask-windows", "2", "--device", "cpu", *words, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ASSUMED: model_type 'cwm' has no table of its own" in done.stderr
    assert "gives transformers' logits, dense and pruned" in " ".join(done.stderr.split())
    summary = json.loads(done.stdout)
    assert summary["family"] == "cwm, assumed to be like llama"
    assert "cwm, assumed to be like llama" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["model_type"] == "cwm"
    shown = python(
        "import sys; from transformers import AutoModelForCausalLM as A; "
        "m = A.from_pretrained(sys.argv[1]); print(sum(p.numel() for p in m.parameters()))",
        out,
    )
    assert int(shown) == summary["after"]["parameters"]


def test_streamed_logits_are_hugging_faces(model: Path) -> None:
    assert logits_like(model, assume="llama") < 1e-5


def test_without_it_the_list_and_the_way_out_are_shown(model: Path) -> None:
    message = fail("inspect", model)
    assert "model_type 'cwm' is not supported; supported: apertus, arcee," in message
    assert "--assume-family (llama fits most)" in message
    assert "docs/adding-a-family.md" in message


def test_a_family_that_does_not_exist(model: Path) -> None:
    message = fail("inspect", model, "--assume-family", "lama")
    assert "--assume-family: 'lama' is not one of apertus, arcee," in message


def test_tensors_of_other_names_are_refused(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.gate_proj.weight"
    tensors[name.replace("gate_proj", "w1")] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = fail("inspect", folder, "--assume-family", "llama")
    assert f"the checkpoint has no tensor '{name}'" in message


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("hyperclovax", "a reconstruction of the whole model changes model.layers.0.mlp.down_proj"),
        ("olmo", "its final norm does not follow its weight"),
        ("granite_swa", "transformers does not load it pruned"),
        ("jais2", "the checkpoint has no tensor 'model.layers.0.mlp.gate_proj.weight'"),
    ],
)
def test_an_architecture_that_is_not_like_it_is_refused(
    model_type: str, reason: str, tmp_path: Path
) -> None:
    """Multipliers, norms without weights, a tensor for each head, an FFN without a gate."""
    save_tiny(tmp_path / "m", model_type, **{**CONFIG, "num_hidden_layers": 4})
    message = fail("inspect", tmp_path / "m", "--assume-family", "llama")
    assert reason in message


def test_a_family_with_a_table_keeps_its_own(tmp_path: Path) -> None:
    save_tiny(tmp_path / "q", "qwen3", **CONFIG)
    done = frugal_bonsai("inspect", tmp_path / "q", "--assume-family", "llama", "--json")
    assert json.loads(done.stdout)["family"] == "qwen3"
