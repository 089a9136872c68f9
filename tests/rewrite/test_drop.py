"""Dropped layers: masked parent == rewritten model, in plain transformers too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import FreshProcesses
from tiny_models import random_windows, tiny_family
from transformers import AutoModelForCausalLM

from frugal_bonsai import load_pruned
from frugal_bonsai.errors import OptionError
from frugal_bonsai.memory.plan import SweepLimits
from frugal_bonsai.model.drop import with_kept_layers
from frugal_bonsai.model.layout import LAYOUTS, PER_LAYER, UNIFORM, layout_rules
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.mask_file import read_mask, write_mask
from frugal_bonsai.rewrite.shrink import shrink
from frugal_bonsai.rewrite.verify import compare_logits
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.source import CheckpointSource
from rewrite.models import (
    Parent,
    greedy,
    logits_of,
    masked_parent,
    open_parent,
    random_mask,
    relative_difference,
    tiny_parent,
    tokens,
)

LAYERS, DROPPED = 5, (0, 3)
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
"""


def _engine(parent: Parent) -> Engine:
    limits = SweepLimits(
        micro_batch=2, windows_in_flight=8, resident_windows=0, head_rows=64, head_tokens=64
    )
    return Engine(
        parent.checkpoint,
        parent.spec,
        device=torch.device("cpu"),
        dtype=torch.float32,
        limits=limits,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("biases", [False, True], ids=["no biases", "biases"])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_masked_parent_equals_rewritten_model_without_the_layers(
    tmp_path: Path, layout: str, biases: bool, cut: bool
) -> None:
    with tiny_parent(
        tmp_path / "dense", num_hidden_layers=LAYERS, attention_bias=biases, mlp_bias=biases
    ) as parent:
        mask = random_mask(parent.spec, layout) if cut else KeepMask(parent.spec.table)
        units = masked_parent(parent, mask)
        mask = mask.without_layers(DROPPED)
        assert mask.dropped_layers() == DROPPED
        summary = parent.shrink(mask, tmp_path / "out", layout)
        model = units  # Hugging Face's model, its layers taken out of the list
        kept = [layer for at, layer in enumerate(model.model.layers) if at not in DROPPED]
        model.model.layers = torch.nn.ModuleList(kept)
        expected = logits_of_first(model)
        with open_parent(tmp_path / "out") as output:
            masked = CheckpointSource(parent.checkpoint, parent.spec, mask=mask)
            # The keystone as prune checks it: the parent's own layers, all of them, masked.
            assert compare_logits(_engine(parent), masked, _engine(output), tokens()) < 1e-5
            assert output.spec.layers == LAYERS - len(DROPPED)
            assert output.spec.block_parameters == summary.block_parameters_after
    found = load_pruned(tmp_path / "out", attn_implementation="eager")
    assert relative_difference(logits_of(found, tokens()), expected) <= 1e-4
    assert found.config.num_hidden_layers == 3 and len(found.model.layers) == 3
    if not cut:
        gone = len(DROPPED) / LAYERS
        assert summary.sparsity == pytest.approx(gone) and 1 - (
            summary.block_parameters_after / summary.block_parameters_before
        ) == pytest.approx(gone)


def logits_of_first(model: torch.nn.Module) -> torch.Tensor:
    """Layers of the parent use the cache by their old index, so it generates without a cache."""
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits.float()


@pytest.mark.parametrize("layout", [UNIFORM, PER_LAYER])
def test_plain_transformers_loads_it_and_generates(
    tmp_path: Path, layout: str, fresh: FreshProcesses
) -> None:
    """Equal widths need no custom code, whatever the layout."""
    with tiny_parent(tmp_path / "dense", num_hidden_layers=LAYERS) as parent:
        mask = KeepMask(parent.spec.table).without_layers(DROPPED)
        parent.shrink(mask, tmp_path / "out", layout)
    torch.save(tokens(), tmp_path / "tokens.pt")
    paths = [tmp_path / "out", tmp_path / "tokens.pt", tmp_path / "logits.pt"]
    fresh.run(LOAD, *paths, folder=tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", attn_implementation="eager")
    kept = [layer for at, layer in enumerate(dense.model.layers) if at not in DROPPED]
    dense.model.layers = torch.nn.ModuleList(kept)
    assert relative_difference(torch.load(paths[-1]), logits_of_first(dense)) <= 1e-4
    model = load_pruned(tmp_path / "out")
    assert greedy(model, tokens()).shape[1] == tokens().shape[1] + 20
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3 and "per_layer_config" not in config


def test_per_layer_numbers_are_those_of_the_new_layers(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense", num_hidden_layers=LAYERS) as parent:
        mask = KeepMask(parent.spec.table)
        for group in parent.spec.table.groups:
            if group.kind == "ffn":
                mask.of(group)[: group.layer + 1] = False
        parent.shrink(mask.without_layers(DROPPED), tmp_path / "out", PER_LAYER)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # Layers 1, 2 and 4 of 20 channels stay: the widest is 18.
    assert config["intermediate_size"] == 18
    assert config["per_layer_config"] == {
        "1": {"intermediate_size": 17},
        "2": {"intermediate_size": 15},
    }


def test_config_lists_with_an_entry_a_layer_are_shortened(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense", num_hidden_layers=LAYERS) as parent:
        types = [FULL, SLIDING, FULL, SLIDING, "chunked_attention"]
        spec = replace(parent.spec, config={**parent.spec.config, "layer_types": types})
        mask = KeepMask(spec.table)
        assert with_kept_layers(spec, mask) is spec
        config = with_kept_layers(spec, mask.without_layers(DROPPED)).config
    assert config["layer_types"] == [SLIDING, FULL, "chunked_attention"]
    assert config["num_hidden_layers"] == 3


SLIDING, FULL = "sliding_attention", "full_attention"
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": LAYERS},
    "gemma2": {"num_hidden_layers": LAYERS},
    "gemma3": {
        "num_hidden_layers": LAYERS,
        "layer_types": [SLIDING, FULL, SLIDING, FULL, FULL],
    },
    "smollm3": {"num_hidden_layers": LAYERS, "no_rope_layers": [1, 0, 0, 1, 1]},
    "qwen2": {"num_hidden_layers": LAYERS, "max_window_layers": 2},
    "mistral": {"num_hidden_layers": LAYERS},
    "olmo2": {"num_hidden_layers": LAYERS},
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layout", [UNIFORM, PER_LAYER])
def test_other_families_without_layers_compute_what_is_left_of_the_parent(
    tmp_path: Path, name: str, layout: str
) -> None:
    """Sliding windows and rotary embeddings depend on the old index and stay with the layer."""
    tiny = tiny_family(tmp_path / "dense", name, **FAMILIES[name])
    mask = KeepMask(tiny.spec.table).without_layers((1, 3))
    (tmp_path / "out").mkdir()
    rules = layout_rules(tiny.spec, layout, tile=1)
    shrink(tiny.checkpoint, tiny.spec, mask, tmp_path / "out", rules=rules)
    long = random_windows(2, 40, vocabulary=tiny.spec.vocabulary)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    module = dense.get_submodule(f"{tiny.spec.family.base_module}.{tiny.spec.family.layers_module}")
    for at in (1, 3):
        for group in tiny.spec.table.of_layer(at):
            output = module[at].get_submodule(group.output)
            torch.nn.init.zeros_(output.weight)
            if output.bias is not None:
                torch.nn.init.zeros_(output.bias)
    found = load_pruned(tmp_path / "out", dtype=torch.float32)
    assert relative_difference(logits_of(found, long), logits_of(dense, long)) <= 1e-4
    assert found.config.num_hidden_layers == 3


def test_a_mask_file_may_drop_layers_but_not_half_of_one_and_not_all(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense", num_hidden_layers=LAYERS) as parent:
        spec, path = parent.spec, tmp_path / "mask.json"
        mask = KeepMask(spec.table).without_layers(DROPPED)
        write_mask(path, "m", spec, mask)
        assert read_mask(path, spec) == mask
        half = KeepMask(spec.table)
        half.of(spec.table.groups[3])[:] = False
        write_mask(path, "m", spec, half)
        with pytest.raises(OptionError, match=r"mask\.json: .* layer 1 keeps none of its 20"):
            read_mask(path, spec)
        write_mask(path, "m", spec, mask.without_layers(range(LAYERS)))
        with pytest.raises(OptionError, match=r"drops every layer; keep at least one"):
            read_mask(path, spec)
