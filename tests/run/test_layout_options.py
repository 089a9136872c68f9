"""``prune --layout``: what each layout's command leaves behind, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import fail, succeed
from fresh_process import FreshProcesses

from frugal_bonsai import load_pruned, load_tokenizer
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.model.family import describe_model
from frugal_bonsai.model.units import ATTENTION, KeepMask
from frugal_bonsai.rewrite.mask_file import write_mask

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


def test_padded_is_what_per_layer_is_and_loads_everywhere(
    tmp_path: Path, fresh: FreshProcesses
) -> None:
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
    found = json.loads(fresh.run(PLAIN, tmp_path / "padded", folder=tmp_path))
    assert found["type"] == "llama" and found["made"] == 8
    assert found["parameters"] == padded["after"]["parameters"] > ragged["after"]["parameters"]
    filled = padded["after"]["parameters"] - ragged["after"]["parameters"]
    assert filled <= found["zeros"] < filled + 0.01 * found["parameters"]
    stored = padded["after"]["block_parameters"] / padded["before"]["block_parameters"]
    card = (tmp_path / "padded" / "README.md").read_text(encoding="utf-8")
    assert f"{1 - stored:.1%} are gone from the files" in card and "no custom code" in card
    assert "AutoModelForCausalLM" in padded["load"]


CALIBRATION = ("--calibration", "stdlib", "--windows", "4", "--window", "64")


def test_as_mistral_lets_a_llama_keep_any_number_of_heads(
    tmp_path: Path, stories260k: Path, fresh: FreshProcesses
) -> None:
    """Eight heads in four groups; three groups are six heads, of which 64 is no multiple."""
    words = ("prune", stories260k, "--sparsity", "0.25", "--level", "none", "--allocation", "equal")
    words += ("--step", "0.25", "--tile", "1", "--max-cpu-mem", "2GB", *CALIBRATION)
    summary = succeed(*words, "--as-mistral", "--out", tmp_path / "out")
    assert summary["kept"]["attention"] == [3] * 5
    assert (summary["family"], summary["written_as"]) == ("llama", "mistral")
    assert summary["verify"]["max_relative_difference"] <= 1e-4
    found = json.loads(fresh.run(PLAIN, tmp_path / "out", folder=tmp_path))
    assert (found["type"], found["made"]) == ("mistral", 8)
    assert found["parameters"] == summary["after"]["parameters"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "Written as model_type 'mistral'" in card
    # Without it the same search keeps two or four.
    plain = succeed(*words, "--out", tmp_path / "plain")
    assert plain["written_as"] == "llama" and set(plain["kept"]["attention"]) <= {2, 4}
    # The mask can be applied elsewhere, and only with the same permission.
    mask = ("--mask", tmp_path / "out" / "pruning_mask.json")
    text = fail("shrink", stories260k, *mask, "--out", tmp_path / "again")
    assert "keeps 3 of 4 attention units" in text
    result = succeed("shrink", stories260k, *mask, "--as-mistral", "--out", tmp_path / "again")
    assert result["written_as"] == "mistral"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--layout", "per-layer"), "--as-mistral: is for --layout uniform and padded"),
        (("--method", "fluctuation"), "--as-mistral: a Mistral has no biases"),
    ],
)
def test_as_mistral_where_it_cannot_be(
    tmp_path: Path, words: tuple[str, ...], expected: str
) -> None:
    text = fail("prune", "example", "--as-mistral", *words, "--out", tmp_path / "out", *QUICK)
    assert expected in text and list(tmp_path.iterdir()) == []


def test_per_layer_at_a_head_count_that_llamas_config_forbids(
    tmp_path: Path, stories260k: Path, fresh: FreshProcesses
) -> None:
    """Three groups everywhere are six heads, of which 64 is no multiple; it is streamed too."""
    with Checkpoint.open(stories260k) as checkpoint:
        spec = describe_model(checkpoint.config, checkpoint.shapes)
    mask = KeepMask(spec.table)
    for group in spec.table.groups:
        mask.of(group)[3 if group.kind == ATTENTION else 50 + group.layer :] = False
    write_mask(tmp_path / "mask.json", "stories260K", spec, mask)
    words = ("--mask", tmp_path / "mask.json", "--layout", "per-layer", "--out", tmp_path / "out")
    result = succeed("shrink", stories260k, *words)
    assert result["load"].startswith("import frugal_bonsai; model = frugal_bonsai.load_pruned(")
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl. " * 40, encoding="utf-8")
    measured = succeed("eval", tmp_path / "out", "--text", text, "--window", "64")
    model = load_pruned(tmp_path / "out", dtype=torch.float32)
    ids = load_tokenizer(tmp_path / "out")(text.read_text(), add_special_tokens=False).input_ids
    windows = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    with torch.no_grad():
        loss = float(model(windows, labels=windows).loss)
    assert measured["nll"] == pytest.approx(loss, rel=1e-4)
