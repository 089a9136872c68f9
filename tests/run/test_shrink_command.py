"""``frugal-bonsai shrink``: a mask that someone made elsewhere, applied as a user applies it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fail, frugal_bonsai, python, succeed
from fresh_process import FreshProcesses
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from frugal_bonsai.checkpoint.locate import find_model
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import CheckpointError
from frugal_bonsai.model.family import ModelSpec, describe_model
from frugal_bonsai.model.layout import LAYOUTS, PADDED, PER_LAYER, UNIFORM
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.mask_file import read_mask, write_mask
from frugal_bonsai.run.report import report_page
from frugal_bonsai.run.runs import list_runs

QUICK = ("--windows", "4", "--window", "64", "--level", "none", "--max-cpu-mem", "2GB")

LOGITS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
folder, tokens, answer, remote = sys.argv[1:5]
model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, trust_remote_code=remote == "1")
with torch.no_grad():
    torch.save(model(torch.load(tokens)).logits, answer)
print(type(model).__module__)
"""


def describe(model: str | Path) -> tuple[Path, ModelSpec]:
    folder = find_model(str(model))
    with Checkpoint.open(folder) as checkpoint:
        return folder, describe_model(checkpoint.config, checkpoint.shapes)


def masked_logits(folder: Path, spec: ModelSpec, mask: KeepMask, tokens: Any) -> torch.Tensor:
    """The dense model in fp32, the inputs of its output projections zeroed where masked."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for group in spec.table.groups:
        columns_C = mask.columns(group)
        projection = model.model.layers[group.layer].get_submodule(group.output)
        projection.register_forward_pre_hook(
            lambda _module, inputs, columns_C=columns_C: (inputs[0] * columns_C,)
        )
    with torch.no_grad():
        return model(tokens).logits


def plain_logits(
    fresh: FreshProcesses, folder: Path, layout: str, tokens: Any, tmp_path: Path
) -> torch.Tensor:
    """What plain transformers computes, in a process of its own."""
    torch.save(tokens, tmp_path / "tokens")
    remote = "1" if layout == PER_LAYER else "0"
    arguments = (folder, tmp_path / "tokens", tmp_path / "answer", remote)
    said = fresh.run(LOGITS, *arguments, folder=tmp_path)
    assert said.startswith("transformers_modules" if layout == PER_LAYER else "transformers.")
    return torch.load(tmp_path / "answer")


def keep_some(spec: ModelSpec, layout: str) -> KeepMask:
    """Half of the KV groups and FFN channels; per-layer, fewer in later layers."""
    mask = KeepMask(spec.table)
    generator = torch.Generator().manual_seed(2)
    for group in spec.table.groups:
        kept = group.count // 2
        if layout != UNIFORM:
            kept = max(1, kept - group.layer)
        mask.of(group)[torch.randperm(group.count, generator=generator)[kept:]] = False
    return mask


@pytest.mark.parametrize("layout", [UNIFORM, PER_LAYER])
def test_a_prune_without_recovery_and_its_mask_give_the_same_files(
    tmp_path: Path, layout: str
) -> None:
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    options = ("--sparsity", "0.3", "--layout", layout, "--no-recovery", *QUICK)
    summary = succeed("prune", "example", "--out", pruned, *options)
    mask = pruned / "pruning_mask.json"
    result = succeed("shrink", "example", "--mask", mask, "--out", out, "--layout", layout)
    assert result["kept"] == summary["kept"]
    assert result["sparsity"] == pytest.approx(summary["sparsity"])
    sizes = ("parameters", "block_parameters", "weight_bytes")
    assert result["after"] == {key: summary["after"][key] for key in sizes}
    assert any("refitted" in note for note in result["notes"])
    names = {path.name for path in pruned.iterdir()} - {
        "pruning_report.json",
        "report.html",
        "run.toml",
        "events.jsonl",
    }
    page = {path.name for path in out.iterdir()} & {"report.html"}
    assert {path.name for path in out.iterdir()} == names | {"pruning_report.json"} | page
    for name in names - {"README.md"}:
        assert (out / name).read_bytes() == (pruned / name).read_bytes(), name
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "refitted" in card and f"{summary['sparsity']:.1%}" in card
    assert str(tmp_path) not in card
    report = json.loads((out / "pruning_report.json").read_text(encoding="utf-8"))
    assert report["mask"] == mask.name and report["kept"] == summary["kept"]
    assert report["layer_sparsity"] == pytest.approx(summary["layer_sparsity"])
    text = report_page(out, kind="md")
    rows = [" ".join(row.split()) for row in text.splitlines()]
    for layer, share in enumerate(summary["layer_sparsity"]):
        counts = (f"{summary['kept'][kind][layer]} of" for kind in ("attention", "ffn"))
        [row] = [row for row in rows if row.startswith(f"| {layer} | ")]
        assert all(count in row for count in counts) and f"{share:.1%}" in row
    assert "| shrink | example |" in text and str(tmp_path) not in text
    [run] = [run for run in list_runs(tmp_path) if run["out"] == "out"]
    assert (run["command"], run["state"]) == ("shrink", "finished")
    assert run["progress"] == f"{summary['sparsity']:.0%} removed"
    with pytest.raises(CheckpointError, match=r"out: shrink wrote it and measured no perplexity"):
        report_page(out, pruned)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_real_model_equals_its_masked_parent(
    tmp_path: Path, stories3m: Path, fresh: FreshProcesses, layout: str
) -> None:
    folder, spec = describe(stories3m)
    mask = keep_some(spec, layout)
    write_mask(tmp_path / "mask.json", "stories3M", spec, mask)
    out = tmp_path / "out"
    result = succeed(
        "shrink", folder, "--mask", tmp_path / "mask.json", "--out", out, "--layout", layout
    )
    tokens = torch.randint(3, spec.vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = masked_logits(folder, spec, mask, tokens)
    found = plain_logits(fresh, out, layout, tokens, tmp_path)
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-4
    removed = result["before"]["block_parameters"] - result["after"]["block_parameters"]
    if layout == PADDED:  # the first layer is the widest: one of 2 KV groups, 256 of 512 channels
        assert removed == spec.layers * (49_152 + 256 * 3 * 192)
    else:
        assert removed == mask.removed_parameters()
    share = mask.removed_parameters() / spec.block_parameters
    assert result["sparsity"] == pytest.approx(share)
    # The mask in the output is the one that was given: it can be shared on.
    assert read_mask(out / "pruning_mask.json", spec) == mask


def test_recovery_is_not_in_a_mask_and_the_command_says_so(tmp_path: Path) -> None:
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    succeed("prune", "example", "--out", pruned, "--sparsity", "0.2", *QUICK)
    mask = pruned / "pruning_mask.json"
    done = frugal_bonsai("shrink", "example", "--mask", mask, "--out", out, "-q")
    assert done.returncode == 0, done.stderr
    assert "recovery refitted are not in it" in " ".join(done.stdout.split())
    assert "AutoModelForCausalLM.from_pretrained" in done.stdout
    theirs, ours = (load_file(path / "model.safetensors") for path in (pruned, out))
    different = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert "model.layers.1.mlp.down_proj.weight" in different
    assert "model.embed_tokens.weight" not in different


def refused(tmp_path: Path, *words: str | Path) -> str:
    before = sorted(tmp_path.iterdir())
    text = fail("shrink", *words, "--out", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
    return text


def test_what_is_refused_leaves_nothing(tmp_path: Path) -> None:
    _, spec = describe("example")
    mask, path = keep_some(spec, PER_LAYER), tmp_path / "mask.json"
    write_mask(path, "example", spec, mask)
    text = refused(tmp_path, "example", "--mask", path)
    assert "uniform layout: layer" in text and "take --layout per-layer" in text
    values = json.loads(path.read_text(encoding="utf-8"))
    values["removed"]["ffn"][0] = [10_000]
    path.write_text(json.dumps(values), encoding="utf-8")
    text = refused(tmp_path, "example", "--mask", path, "--layout", "per-layer")
    assert "names unit 10000" in text and "mask.json" in text
    assert "cannot be read" in refused(tmp_path, "example", "--mask", tmp_path / "none")
    assert "no-such" in refused(tmp_path, tmp_path / "no-such", "--mask", path)


def test_a_mask_for_another_model(tmp_path: Path, stories3m: Path) -> None:
    _, spec = describe(stories3m)
    write_mask(tmp_path / "mask.json", "stories3M", spec, keep_some(spec, UNIFORM))
    text = refused(tmp_path, "example", "--mask", tmp_path / "mask.json")
    assert "belongs to another model: 'stories3M'" in text


def test_an_output_that_exists(tmp_path: Path) -> None:
    _, spec = describe("example")
    write_mask(tmp_path / "mask.json", "example", spec, keep_some(spec, UNIFORM))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me", encoding="utf-8")
    assert "exists" in refused(tmp_path, "example", "--mask", tmp_path / "mask.json")
    assert (tmp_path / "out" / "mine.txt").read_text(encoding="utf-8") == "keep me"


def test_the_python_function(tmp_path: Path) -> None:
    import frugal_bonsai as package

    _, spec = describe("example")
    write_mask(tmp_path / "mask.json", "example", spec, keep_some(spec, UNIFORM))
    result = package.shrink("example", tmp_path / "mask.json", tmp_path / "out")
    assert f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})" in result["load"]
    shutil.rmtree(tmp_path / "out")


HELD = """
import json, sys
from pathlib import Path
import numpy, torch, transformers
from frugal_bonsai.memory.meter import peak_resident_bytes, resident_bytes
from frugal_bonsai.rewrite import shrink as rewriter
from frugal_bonsai.run.open import open_model
from frugal_bonsai.run.shrink import shrink
with open_model(sys.argv[1]):  # imports what checks the config
    pass
Path("/proc/self/clear_refs").write_text("5")
before = resident_bytes()
shrink(*sys.argv[1:], report=False)
print(json.dumps(peak_resident_bytes() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read on Linux")
@pytest.mark.parametrize("copied", [True, False], ids=["copied", "streamed"])
def test_less_than_one_tensor_is_held(tmp_path: Path, copied: bool) -> None:
    """An embedding of 96 MiB and projections of 24 MiB pass through a few megabytes."""
    sizes = {"hidden_size": 768, "intermediate_size": 16_384, "num_attention_heads": 12}
    config = LlamaConfig(vocab_size=65_536, num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "dense")
    _, spec = describe(tmp_path / "dense")
    write_mask(tmp_path / "mask.json", "dense", spec, keep_some(spec, UNIFORM))
    without = "" if copied else "import os\ndel os.copy_file_range\n"
    arguments = (tmp_path / "dense", tmp_path / "mask.json", tmp_path / "out")
    held = json.loads(python(without + HELD, *arguments).splitlines()[-1])
    assert 0 < held < 24 * 2**20
