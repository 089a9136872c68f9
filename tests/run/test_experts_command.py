"""Mixtures of experts through the command line: channels of experts, whole experts, who is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import fail, forked_python, succeed
from tiny_models import EXPERTS_PRUNED, save_byte_tokenizer, tiny_family

import frugal_bonsai
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.model.canonical_names import describe_checkpoint
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.layouts.bundled import FILE
from frugal_bonsai.rewrite.mask_file import write_mask
from frugal_bonsai.run.options import PruneOptions

PRUNED = """
import json, sys, torch
from transformers import AutoModelForCausalLM
if sys.argv[2] == "per-layer":
    from frugal_bonsai import load_pruned as load
else:
    load = AutoModelForCausalLM.from_pretrained
model = load(sys.argv[1])
prompt = torch.tensor([[65, 66, 67]])
made = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, pad_token_id=0)
experts = [tuple(layer.mlp.experts.down_proj.shape) for layer in model.model.layers]
routers = [tuple(layer.mlp.gate.weight.shape) for layer in model.model.layers]
print(json.dumps({"made": made.shape[1], "experts": experts, "routers": routers,
                  "chosen": [layer.mlp.gate.top_k for layer in model.model.layers],
                  "parameters": sum(p.numel() for p in model.parameters())}))
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("experts")
    for name in EXPERTS_PRUNED:
        tiny_family(folder / name, name, vocab_size=256).checkpoint.close()
        save_byte_tokenizer(folder / name)
    return {path.name: path for path in folder.iterdir()}


# The example model's neighbour: text that lies in every Python.
QUICK = (
    "--calibration", "stdlib", "--window", "32", "--windows", "16", "--masks", "4",
    "--mask-windows", "4", "--max-cpu-mem", "2GB", "--device", "cpu",
)  # fmt: skip


def test_layers_end_with_experts_of_their_own_widths(
    dense: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    summary = succeed(
        "prune", dense["mixtral"], "--out", out, "--layout", "per-layer", "--sparsity", "0.3",
        "--step", "0.15", *QUICK,
    )  # fmt: skip
    assert summary["sparsity"] == pytest.approx(0.3, abs=0.02)
    assert summary["verify"]["max_relative_difference"] < 1e-5
    assert any("gate_proj, up_proj and the router stay" in note for note in summary["notes"])
    assert summary["kept"]["experts"] == [4, 4]
    found = json.loads(forked_python(PRUNED, out, "per-layer"))
    assert found["made"] == 8
    assert found["parameters"] == summary["after"]["parameters"] < summary["before"]["parameters"]
    widths = [shape[2] for shape in found["experts"]]
    assert [4 * width for width in widths] == summary["kept"]["ffn"]
    assert all(0 <= r["recovery_residual"] < 1 for r in summary["rounds"])
    assert (out / FILE).exists()


@pytest.mark.parametrize(
    ("name", "sparsity", "left"), [("qwen3-moe", "0.4", 2), ("olmoe", "0.55", 1)]
)
def test_whole_experts_go(
    name: str, sparsity: str, left: int, dense: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    summary = succeed(
        "prune", dense[name], "--out", out, "--method", "experts", "--sparsity", sparsity, *QUICK
    )
    assert summary["kept"]["experts"] == [left, left]
    assert summary["verify"]["max_relative_difference"] < 1e-5
    gone = 2 * (4 - left) * (20 * 3 * 24 + 24)
    assert summary["before"]["parameters"] - summary["after"]["parameters"] == gone
    assert f"{4 - left} of 4 experts of every layer are dropped" in summary["rounds"][0]["note"]
    found = json.loads(forked_python(PRUNED, out, "uniform"))
    assert found["made"] == 8
    assert found["experts"] == [[left, 24, 20]] * 2
    assert found["routers"] == [[left, 24]] * 2
    assert found["chosen"] == [min(2, left)] * 2
    if name == "olmoe":
        return
    # The mask alone makes the same shapes.
    again = succeed(
        "shrink", dense[name], "--mask", out / "pruning_mask.json", "--out", tmp_path / "again"
    )
    assert again["after"]["parameters"] == summary["after"]["parameters"]
    assert again["kept"]["experts"] == [left, left]


def test_layers_with_other_numbers_of_experts_are_pruned_further(
    dense: dict[str, Path], tmp_path: Path
) -> None:
    with Checkpoint.open(dense["qwen3-moe"]) as checkpoint:
        spec = describe_checkpoint(checkpoint)
    mask = KeepMask(spec.table)
    for group in spec.table.groups:
        if (group.layer, group.expert) in ((0, 1), (0, 3), (1, 0)):
            mask.of(group)[:] = False
    write_mask(tmp_path / "mask.json", "dense", spec, mask)
    once, words = tmp_path / "once", ("--sparsity", "0.2", "--step", "0.2", *QUICK)
    frugal_bonsai.shrink(str(dense["qwen3-moe"]), tmp_path / "mask.json", once, layout="per-layer")
    for layout in ("uniform", "padded"):
        error = fail("prune", once, "--out", tmp_path / "out", "--layout", layout, *words)
        assert f"--layout: {layout} keeps the same number of experts in every layer" in error
        assert "2 to 3" in error
    options = PruneOptions(
        settings={"sparsity": 0.2, "step": 0.2, "masks": 4, "mask_windows": 4},
        layout="per-layer",
        calibration="stdlib",
        window=32,
        windows=16,
        device="cpu",
    )
    summary = frugal_bonsai.prune(str(once), tmp_path / "twice", options)
    assert summary["kept"]["experts"] == [2, 3]
    assert summary["sparsity"] == pytest.approx(0.2, abs=0.03)
    assert summary["verify"]["max_relative_difference"] < 1e-5
    found = json.loads(forked_python(PRUNED, tmp_path / "twice", "per-layer"))
    assert [shape[0] for shape in found["experts"]] == [2, 3]
    assert found["parameters"] == summary["after"]["parameters"]


def test_what_does_not_apply_is_refused(dense: dict[str, Path], tmp_path: Path) -> None:
    words = ("--out", tmp_path / "out", "--sparsity", "0.3", *QUICK)
    refusals = {
        ("--refine", "2"): "--refine 2: moves the channels of one FFN",
        ("--method", "fluctuation"): "olmoe has no bias at mlp.experts.0.down_proj",
        ("--tile", "12"): "--tile: 12 is no multiple of 8",
        ("--method", "experts", "--sparsity", "0.9"): "cannot be had from whole experts",
        ("--prior", "reap"): "--allocation experts and --prior reap go together",
    }
    for options, text in refusals.items():
        assert text in fail("prune", dense["olmoe"], *words, *options)
    adapt = fail(
        "adapt", dense["olmoe"], "--out", tmp_path / "out", "--data", "stdlib", "--loss", "lm"
    )
    assert "adapt does not train a olmoe" in adapt
    exported = fail("export", dense["olmoe"], "--format", "gguf", "--out", tmp_path / "out")
    assert "6 query heads and 3 KV heads, and llama.cpp wants the same number of both" in exported
    assert "have no experts" in fail("prune", "example", *words, "--method", "experts")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


def test_inspect_counts_experts(dense: dict[str, Path]) -> None:
    info = succeed("inspect", dense["qwen3-moe"])
    assert (info["experts"], info["experts_chosen"]) == (4, 2)
    assert info["groups"][1]["units_per_layer"] == [80, 80]
