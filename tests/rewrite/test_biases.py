"""Biases that the rewriter adds: masked parent == rewritten model, in plain transformers too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fresh_process import FreshProcesses
from safetensors.torch import load_file, save_file

from frugal_bonsai import load_pruned
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.biases import added_biases, output_bias, require_output_biases
from frugal_bonsai.model.canonical_names import describe_checkpoint
from frugal_bonsai.model.family import describe_model
from frugal_bonsai.model.layout import LAYOUTS, UNIFORM
from frugal_bonsai.model.units import ATTENTION, FFN
from rewrite.models import (
    Parent,
    logits_of,
    masked_parent,
    random_mask,
    relative_difference,
    thunks,
    tiny_parent,
    tokens,
)

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
"""


def _random_biases(parent: Parent, kinds: tuple[str, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        output_bias(group): torch.randn(parent.spec.hidden, generator=generator)
        for group in parent.spec.table.groups
        if group.kind in kinds
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kinds", [(ATTENTION, FFN), (FFN,)], ids=["both", "ffn"])
@pytest.mark.parametrize("own", [False, True], ids=["new", "own"])
def test_masked_parent_with_biases_equals_rewritten_model(
    tmp_path: Path, layout: str, kinds: tuple[str, ...], own: bool, fresh: FreshProcesses
) -> None:
    with tiny_parent(tmp_path / "dense", attention_bias=own, mlp_bias=own) as parent:
        mask, biases = random_mask(parent.spec, layout), _random_biases(parent, kinds)
        summary = parent.shrink(mask, tmp_path / "out", layout, refit=thunks(biases))
        model = masked_parent(parent, mask)
        for name, bias in biases.items():
            module = model.get_submodule(name.removesuffix(".bias"))
            module.bias = torch.nn.Parameter(bias)
        expected = logits_of(model, tokens())
        plain = logits_of(masked_parent(parent, mask), tokens())
        added = added_biases(parent.spec, biases)
    assert relative_difference(plain, expected) > 0.01
    found = load_pruned(tmp_path / "out", attn_implementation="eager")
    assert relative_difference(logits_of(found, tokens()), expected) <= 1e-4
    assert summary.parameters_after == found.num_parameters()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert bool(config.get("attention_bias")) == (own or ATTENTION in kinds)
    assert bool(config.get("mlp_bias")) == (own or FFN in kinds)
    if own:
        assert added == ()
        return
    # Projections that share the config's key with the output get a bias of zero.
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name in weights if name.endswith(".bias")} == set(added)
    assert len(added) == 3 * (4 * (ATTENTION in kinds) + 3 * (FFN in kinds))
    for name in set(added) - set(biases):
        assert not weights[name].any()
    if layout == UNIFORM:
        torch.save(tokens(), tmp_path / "tokens.pt")
        paths = [tmp_path / "out", tmp_path / "tokens.pt", tmp_path / "logits.pt"]
        fresh.run(LOAD, *paths, folder=tmp_path)
        assert relative_difference(torch.load(paths[-1]), expected) <= 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_output_with_biases_is_a_source_like_any_other(tmp_path: Path, layout: str) -> None:
    with tiny_parent(tmp_path / "dense") as parent:
        mask, biases = random_mask(parent.spec, layout), _random_biases(parent, (ATTENTION, FFN))
        parent.shrink(mask, tmp_path / "out", layout, refit=thunks(biases))
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        spec = describe_model(checkpoint.config, checkpoint.shapes)
    assert added_biases(spec, biases) == ()
    bias_rows = {p.tensor for g in spec.table.groups for p in g.slices if "bias" in p.tensor}
    assert len(bias_rows) == 3 * 5  # q, k, v, gate and up lose theirs with their units


def test_an_architecture_without_room_for_biases_is_refused(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense") as parent:
        require_output_biases(parent.spec)
        spec = replace(parent.spec, family=replace(parent.spec.family, bias_keys={}))
    with pytest.raises(OptionError, match=r"--bias: llama has no bias at self_attn\.o_proj"):
        require_output_biases(spec)
    with tiny_parent(tmp_path / "own", attention_bias=True, mlp_bias=True) as parent:
        require_output_biases(replace(parent.spec, family=spec.family))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropped_layers_get_no_biases(tmp_path: Path, layout: str) -> None:
    with tiny_parent(tmp_path / "dense", num_hidden_layers=4) as parent:
        mask = random_mask(parent.spec, layout).without_layers((0, 2))
        biases = _random_biases(parent, (FFN,))
        kept = {n: b for n, b in biases.items() if ".1." in n or ".3." in n}
        summary = parent.shrink(mask, tmp_path / "out", layout, refit=thunks(kept))
        with pytest.raises(OptionError, match=r"layers\.0\.mlp\.down_proj\.bias.*mask removes"):
            parent.shrink(mask, tmp_path / "refused", layout, refit=thunks(biases))
    found = load_pruned(tmp_path / "out")
    assert summary.parameters_after == found.num_parameters()
    for layer, source in enumerate((1, 3)):
        bias = found.model.layers[layer].mlp.down_proj.bias
        assert torch.equal(bias, biases[f"model.layers.{source}.mlp.down_proj.bias"])


def test_added_biases_are_named_as_the_source_names_its_tensors(tmp_path: Path) -> None:
    """A base model's file has no prefix, so an added bias must not have one."""
    tiny_parent(tmp_path / "dense", tie_word_embeddings=True).checkpoint.close()
    path = tmp_path / "dense" / "model.safetensors"
    bare = {name.removeprefix("model."): value for name, value in load_file(path).items()}
    save_file(bare, path, metadata={"format": "pt"})
    with Checkpoint.open(tmp_path / "dense") as checkpoint:
        spec = describe_checkpoint(checkpoint)
        parent = Parent(tmp_path / "dense", checkpoint, spec)
        biases = _random_biases(parent, (FFN,))
        parent.shrink(random_mask(spec, UNIFORM), tmp_path / "out", UNIFORM, refit=thunks(biases))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(
        written["layers.1.mlp.down_proj.bias"], biases["model.layers.1.mlp.down_proj.bias"]
    )
    assert not any(name.startswith("model.") for name in written)
