"""The configs that the layouts write, and the masks that they refuse."""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

from frugal_bonsai import load_pruned, load_tokenizer
from frugal_bonsai.errors import OptionError, UnsupportedModelError
from frugal_bonsai.model.families import FAMILIES
from frugal_bonsai.model.layout import LAYOUTS, PADDED, PER_LAYER, UNIFORM
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.layouts import WRITE_CONFIG, padded, per_layer, uniform
from frugal_bonsai.rewrite.layouts.bundled import find_bundled, read_bundled
from rewrite.models import MHA, keep_counts, open_parent, save_llama, tiny_parent


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def save_tokenizer(folder: Path) -> None:
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def test_every_layout_has_a_writer() -> None:
    assert set(WRITE_CONFIG) == set(LAYOUTS)


def test_uniform_changes_the_widths_alone(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense") as parent:
        mask = keep_counts(parent.spec, {"attention": [2, 2, 2], "ffn": [9, 9, 9]})
        uniform.write_config(parent.spec, mask, parent.rules(UNIFORM), tmp_path)
    expected = parent.checkpoint.config | {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 9,
    }
    assert read_config(tmp_path) == expected


def test_head_dim_and_kv_heads_are_made_explicit(tmp_path: Path) -> None:
    """Old configs omit both, and their defaults would change with the number of heads."""
    save_llama(tmp_path / "dense", **{**MHA, "head_dim": 12})
    config = read_config(tmp_path / "dense")
    del config["head_dim"], config["num_key_value_heads"]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    with open_parent(tmp_path / "dense") as parent:
        mask = keep_counts(parent.spec, {"attention": [2, 2, 2], "ffn": [9, 9, 9]})
        parent.shrink(mask, tmp_path / "out", UNIFORM)
    written = read_config(tmp_path / "out")
    assert (written["head_dim"], written["num_key_value_heads"]) == (12, 2)
    assert load_pruned(tmp_path / "out").model.layers[0].self_attn.q_proj.weight.shape == (24, 48)


def test_per_layer_lists_what_differs_from_the_widest(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense") as parent:
        mask = keep_counts(parent.spec, {"attention": [1, 2, 2], "ffn": [7, 7, 5]})
        per_layer.write_config(parent.spec, mask, parent.rules(PER_LAYER), tmp_path)
    expected = parent.checkpoint.config | {
        "architectures": ["PrunedLlamaForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_pruned.PrunedLlamaConfig",
            "AutoModelForCausalLM": "modeling_pruned.PrunedLlamaForCausalLM",
        },
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 7,
        "per_layer_config": {
            "0": {"num_attention_heads": 2, "num_key_value_heads": 1},
            "2": {"intermediate_size": 5},
        },
    }
    assert read_config(tmp_path) == expected
    assert (tmp_path / "modeling_pruned.py").read_bytes() == read_bundled()


def test_foreign_custom_code_is_not_named_any_more(tmp_path: Path) -> None:
    save_llama(tmp_path / "dense")
    config = read_config(tmp_path / "dense") | {"auto_map": {"AutoConfig": "custom.CustomConfig"}}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    with open_parent(tmp_path / "dense") as parent:
        uniform.write_config(
            parent.spec, KeepMask(parent.spec.table), parent.rules(UNIFORM), tmp_path
        )
    assert "auto_map" not in read_config(tmp_path)


# -- padded: the widest layer's numbers, zeros for the rest --------------------------------------
def test_padded_writes_the_widest_layers_numbers_and_zeros(tmp_path: Path) -> None:
    counts = {"attention": [1, 2, 1], "ffn": [3, 7, 5]}
    with tiny_parent(tmp_path / "dense", attention_bias=True, mlp_bias=True) as parent:
        mask = keep_counts(parent.spec, counts)
        summary = parent.shrink(mask, tmp_path / "out", PADDED)
        dense = load_file(tmp_path / "dense" / "model.safetensors")
    widths = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 7}
    assert read_config(tmp_path / "out") == parent.checkpoint.config | widths
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    query = tensors["model.layers.0.self_attn.q_proj.weight"]
    assert query.shape == (40, 48) and not query[20:].any()
    assert torch.equal(query[:20], dense["model.layers.0.self_attn.q_proj.weight"][:20])
    assert not tensors["model.layers.0.self_attn.v_proj.bias"][10:].any()
    down = tensors["model.layers.2.mlp.down_proj.weight"]
    assert down.shape == (48, 7) and not down[:, 5:].any() and down[:, :5].all()
    # What is stored is counted as stored, what was removed as removed.
    stored = sum(tensor.numel() for name, tensor in tensors.items() if "layers" in name)
    assert summary.block_parameters_after == stored
    assert summary.bytes_after == sum(4 * tensor.numel() for tensor in tensors.values())
    assert summary.removed_parameters == mask.removed_parameters()
    assert summary.removed_parameters > summary.block_parameters_before - stored


def test_padded_goes_up_to_a_head_count_that_llama_accepts(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense", num_attention_heads=6, num_key_value_heads=6) as parent:
        parent.shrink(
            keep_counts(parent.spec, {"attention": [1, 5, 2], "ffn": [9, 9, 9]}),
            tmp_path / "out",
            PADDED,
        )
    assert read_config(tmp_path / "out")["num_attention_heads"] == 6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not model.model.layers[1].self_attn.o_proj.weight[:, 50:].any()


def test_padded_without_any_legal_head_count(tmp_path: Path) -> None:
    """A pruned Llama may have a number of heads that a config of equal layers cannot state."""
    changes = {"num_attention_heads": 24, "num_key_value_heads": 24, "head_dim": 2}
    with tiny_parent(tmp_path / "dense", hidden_size=24, **changes) as parent:
        mask = keep_counts(parent.spec, {"attention": [23, 5, 5], "ffn": [9, 9, 9]})
        rules = parent.rules(PADDED)
        assert padded.padded_counts(parent.spec, mask, rules) == {"attention": 24, "ffn": 9}
        narrow = replace(parent.spec, hidden=22)
        with pytest.raises(OptionError, match=r"padded layout: a layer keeps 23 query heads"):
            padded.padded_counts(narrow, mask, rules)


# -- uniform: what it cannot hold ---------------------------------------------------------------
@pytest.mark.parametrize(
    ("counts", "text"),
    [
        (
            {"attention": [2, 2, 1], "ffn": [9, 9, 9]},
            "layer 2 keeps 1 attention units, layer 0 keeps 2; keep the same.*per-layer",
        ),
        ({"attention": [2, 2, 2], "ffn": [9, 8, 9]}, "layer 1 keeps 8 ffn units, layer 0 keeps 9"),
    ],
)
def test_unequal_counts(tmp_path: Path, counts: dict[str, list[int]], text: str) -> None:
    with tiny_parent(tmp_path / "dense") as parent:
        with pytest.raises(OptionError, match=f"uniform layout: {text}"):
            parent.shrink(keep_counts(parent.spec, counts), tmp_path / "out", UNIFORM)
        assert not any((tmp_path / "out").iterdir())


FIVE = {"attention": [5, 5, 5], "ffn": [9, 9, 9]}


def test_head_count_that_llama_forbids(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense", num_attention_heads=6, num_key_value_heads=6) as parent:
        mask = keep_counts(parent.spec, FIVE)
        text = (
            r"layer 0 keeps 5 attention units, which is 5 query heads; llama demands that "
            r"hidden_size \(48\).*Legal numbers of units: 1, 2, 3, 4, 6; or take --layout per-layer"
        )
        with pytest.raises(OptionError, match=text):
            uniform.write_config(parent.spec, mask, parent.rules(UNIFORM), tmp_path)
        with pytest.raises(OptionError, match=r"keeps 5 of 6 attention units.*nearest are 4 and 6"):
            parent.shrink(mask, tmp_path / "out", UNIFORM)


def test_equal_widths_at_a_forbidden_head_count_need_the_bundled_file(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense", num_attention_heads=6, num_key_value_heads=6) as parent:
        parent.shrink(keep_counts(parent.spec, FIVE), tmp_path / "out", PER_LAYER)
    config = read_config(tmp_path / "out")
    assert "per_layer_config" not in config
    assert config["auto_map"] == find_bundled("llama").auto_map
    assert load_pruned(tmp_path / "out").model.layers[2].self_attn.q_proj.weight.shape == (50, 48)
    save_tokenizer(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out")("ab").input_ids == [1, 2]
    with pytest.raises(Exception, match="not a multiple of the number of attention heads"):
        AutoConfig.from_pretrained(tmp_path / "out")


# -- per-layer: never wrong widths in silence ---------------------------------------------------
@pytest.mark.parametrize(
    ("counts", "key"),
    [
        ({"attention": [1, 2, 3], "ffn": [9, 9, 9]}, "num_attention_heads"),
        ({"attention": [2, 2, 2], "ffn": [9, 7, 9]}, "intermediate_size"),
    ],
)
def test_plain_transformers_raises(tmp_path: Path, counts: dict[str, list[int]], key: str) -> None:
    with tiny_parent(tmp_path / "dense") as parent:
        parent.shrink(keep_counts(parent.spec, counts), tmp_path / "out", PER_LAYER)
    with pytest.raises(AmbiguousGlobalPerLayerAttributeError, match=key):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_config_says_nothing_that_reads_global_widths(tmp_path: Path) -> None:
    """The switch with which transformers builds every layer like the widest must stay off."""
    with tiny_parent(tmp_path / "dense") as parent:
        mask = keep_counts(parent.spec, {"attention": [1, 2, 3], "ffn": [9, 8, 7]})
        parent.shrink(mask, tmp_path / "out", PER_LAYER)
    assert "allow_global_per_layer_attribute_access" not in read_config(tmp_path / "out")
    config = load_pruned(tmp_path / "out").config
    assert not config.allow_global_per_layer_attribute_access
    assert [layer.intermediate_size for layer in config.layer_configs] == [9, 8, 7]
    with pytest.raises(AmbiguousGlobalPerLayerAttributeError):
        _ = config.intermediate_size


def test_bundled_config_checks_each_layer() -> None:
    from frugal_bonsai.rewrite.layouts.modeling_pruned import PrunedLlamaConfig

    with pytest.raises(Exception, match=r"layer 1: num_attention_heads \(6\) is not a multiple"):
        PrunedLlamaConfig(
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            per_layer_config={"1": {"num_key_value_heads": 4}},
        )


def test_architecture_that_transformers_does_not_have() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"has none for model_type 't5'; take --layout uniform"
    ):
        find_bundled("t5")


def test_bundled_file_stands_alone() -> None:
    """It must run on machines with transformers and without this package."""
    tree = ast.parse(read_bundled())
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported - sys.stdlib_module_names <= {"transformers", "torch", "huggingface_hub"}


def test_bundled_file_has_a_class_for_every_family_and_no_other_names() -> None:
    from frugal_bonsai.rewrite.layouts import modeling_pruned

    for model_type in FAMILIES:
        bundled = find_bundled(model_type)
        model = getattr(modeling_pruned, bundled.model_class)
        assert model is getattr(modeling_pruned, bundled.model_class)
        assert model.config_class is getattr(modeling_pruned, bundled.config_class)
        assert (model.__name__, model.__module__) == (
            bundled.model_class,
            modeling_pruned.__name__,
        )
    for name in ("PrunedNothing", "LlamaConfig", "Prunedtorch_dtype"):
        assert not hasattr(modeling_pruned, name)
