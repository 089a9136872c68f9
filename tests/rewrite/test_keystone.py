"""The keystone: masked parent == rewritten model, in every layout."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

from frugal_bonsai import load_pruned, load_tokenizer
from frugal_bonsai.checkpoint.commit import staged_directory
from frugal_bonsai.model.layout import LAYOUTS, PADDED, PER_LAYER, UNIFORM, layout_rules
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.rewrite.companions import write_companions
from frugal_bonsai.rewrite.shrink import shrink
from rewrite.models import (
    GQA,
    MHA,
    greedy,
    logits_of,
    masked_parent,
    open_parent,
    random_mask,
    random_refit,
    relative_difference,
    thunks,
    tiny_parent,
    tokens,
)

LIMIT = 1e-4
HEADS = {"mha": MHA, "gqa": GQA}
CASES = list(itertools.product(LAYOUTS, (False, True), HEADS, (False, True), (False, True)))


@pytest.mark.parametrize(("layout", "tied", "heads", "attention_bias", "mlp_bias"), CASES)
@pytest.mark.parametrize("refitted", [False, True], ids=["kept", "refit"])
def test_masked_parent_equals_rewritten_model(
    tmp_path: Path,
    layout: str,
    tied: bool,
    heads: str,
    attention_bias: bool,
    mlp_bias: bool,
    refitted: bool,
) -> None:
    with tiny_parent(
        tmp_path / "dense",
        seed=CASES.index((layout, tied, heads, attention_bias, mlp_bias)),
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        **HEADS[heads],
    ) as parent:
        mask = random_mask(parent.spec, layout, seed=11)
        refit = random_refit(parent.spec, mask) if refitted else {}
        parent.shrink(mask, tmp_path / "out", layout, refit=thunks(refit))
        expected = logits_of(masked_parent(parent, mask, refit), tokens())
        dense = logits_of(masked_parent(parent, KeepMask(parent.spec.table)), tokens())

    model = load_pruned(tmp_path / "out", attn_implementation="eager")
    assert relative_difference(logits_of(model, tokens()), expected) <= LIMIT
    assert relative_difference(dense, expected) > 0.01  # the mask does something
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    bundled = (tmp_path / "out" / "modeling_pruned.py").exists()
    assert bundled == (layout == PER_LAYER)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generation_with_dynamic_and_static_cache(tmp_path: Path, layout: str) -> None:
    with tiny_parent(tmp_path / "dense", **GQA) as parent:
        mask = random_mask(parent.spec, layout)
        parent.shrink(mask, tmp_path / "out", layout)
        expected = greedy(masked_parent(parent, mask), tokens())
    model = load_pruned(tmp_path / "out")
    assert torch.equal(greedy(model, tokens()), expected)
    assert torch.equal(greedy(model, tokens(), cache_implementation="static"), expected)

    cache = StaticCache(config=model.config, max_cache_len=40)
    assert torch.equal(greedy(model, tokens(), past_key_values=cache), expected)
    # Each layer's cache has that layer's own KV heads.
    stored = mask.counts()["attention"]
    if layout == PADDED:
        stored = [max(stored)] * len(stored)
    assert [layer.keys.shape[1] for layer in cache.layers] == stored
    # The shapes that transformers makes ready before a compiled or chunked prefill agree.
    kv_heads, head_dim = model._get_static_cache_init_shape()
    assert head_dim == parent.spec.head_dim
    assert torch.equal(torch.tensor(kv_heads), torch.tensor(stored)) or (
        layout != PER_LAYER and {kv_heads} == set(stored)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementation_can_be_chosen_and_changed(
    tmp_path: Path, layout: str, attention: str
) -> None:
    with tiny_parent(tmp_path / "dense", **GQA) as parent:
        mask = random_mask(parent.spec, layout)
        parent.shrink(mask, tmp_path / "out", layout)
    model = load_pruned(tmp_path / "out", attn_implementation=attention)
    used = {layer.self_attn.config._attn_implementation for layer in model.model.layers}
    assert used == {attention}
    before = logits_of(model, tokens())
    other = {"eager": "sdpa", "sdpa": "eager"}[attention]
    model.set_attn_implementation(other)
    used = {layer.self_attn.config._attn_implementation for layer in model.model.layers}
    assert used == {other}
    assert relative_difference(logits_of(model, tokens()), before) <= LIMIT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_save_pretrained_round_trip(tmp_path: Path, layout: str) -> None:
    with tiny_parent(tmp_path / "dense", tie_word_embeddings=True) as parent:
        parent.shrink(random_mask(parent.spec, layout), tmp_path / "out", layout)
    model = load_pruned(tmp_path / "out")
    expected = logits_of(model, tokens())
    model.save_pretrained(tmp_path / "again")
    again = load_pruned(tmp_path / "again")
    assert torch.equal(logits_of(again, tokens()), expected)
    first = json.loads((tmp_path / "out" / "config.json").read_text())
    second = json.loads((tmp_path / "again" / "config.json").read_text())
    for key in ("per_layer_config", "auto_map", "architectures", "num_attention_heads"):
        assert first.get(key) == second.get(key), key
    if layout == PER_LAYER:
        file = "modeling_pruned.py"
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


ROPES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 2.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        "factor": 2.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0],
        "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0],
    },
}


@pytest.mark.parametrize("rope", ROPES)
def test_per_layer_with_scaled_rotary_embeddings(tmp_path: Path, rope: str) -> None:
    """Some rotary code of transformers reads head counts from the global config and must not."""
    settings = {"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]}
    with tiny_parent(
        tmp_path / "dense", rope_parameters=settings, max_position_embeddings=32
    ) as parent:
        mask = random_mask(parent.spec, PER_LAYER)
        parent.shrink(mask, tmp_path / "out", PER_LAYER)
        long = tokens(length=48)  # past the limit: dynamic and longrope change there
        expected = logits_of(masked_parent(parent, mask), long)
    assert relative_difference(logits_of(load_pruned(tmp_path / "out"), long), expected) <= LIMIT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pruning_a_pruned_model(tmp_path: Path, layout: str) -> None:
    """A per-layer output is a source like any other, for both layouts."""
    with tiny_parent(tmp_path / "dense", **MHA) as parent:
        first = KeepMask(parent.spec.table)
        for group in parent.spec.table.groups:
            first.of(group)[: 1 + group.layer % 2] = False  # 3, 2, 3 of 4; 19, 18, 19 of 20
        parent.shrink(first, tmp_path / "one", PER_LAYER)
        with open_parent(tmp_path / "one") as second:
            keep = KeepMask(second.spec.table)
            both = first.keep_N.clone()
            for group in second.spec.table.groups:
                # Down to 2 units of attention and 7 channels, the first ones.
                keep.of(group)[2 if group.kind == "attention" else 7 :] = False
                span = parent.spec.table.span(
                    parent.spec.table.of_layer(group.layer)[0 if group.kind == "attention" else 1]
                )
                where = first.keep_N[span].nonzero().flatten()
                both[span] = False
                both[span][where[keep.of(group)]] = True
            second.shrink(keep, tmp_path / "two", layout)
        expected = logits_of(masked_parent(parent, KeepMask(parent.spec.table, both)), tokens())
    model = load_pruned(tmp_path / "two")
    assert relative_difference(logits_of(model, tokens()), expected) <= LIMIT
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    # Equal widths at a legal head count: plain, whatever the layout and the source.
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not {"per_layer_config", "auto_map"} & config.keys()
    assert type(model).__module__.startswith("transformers.")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stories3m(tmp_path: Path, stories3m: Path, layout: str) -> None:
    """Compare a real bf16 model with its tokenizer, in fp32."""
    with open_parent(stories3m) as parent:
        mask = KeepMask(parent.spec.table)
        generator = torch.Generator().manual_seed(1)
        for group in parent.spec.table.groups:
            spread = 0 if layout == UNIFORM else group.layer
            kept = 1 + spread % 2 if group.kind == "attention" else 256 + 7 * spread
            mask.of(group)[torch.randperm(group.count, generator=generator)[kept:]] = False
        rules = layout_rules(parent.spec, layout)
        with staged_directory(tmp_path / "out") as staging:
            summary = shrink(parent.checkpoint, parent.spec, mask, staging, rules=rules)
            companions = write_companions(stories3m, staging)
        expected = masked_parent(parent, mask)
    assert companions == ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
    removed = mask.removed_parameters()
    if layout == PADDED:  # the widest layer keeps both KV groups and 291 of 512 channels
        removed = 6 * (512 - 291) * 3 * 192
        assert summary.sparsity > removed / summary.block_parameters_before
    assert summary.block_parameters_before - summary.block_parameters_after == removed
    assert summary.parameters_before - summary.parameters_after == removed
    assert summary.bytes_before - summary.bytes_after == 2 * removed

    tokenizer = load_tokenizer(tmp_path / "out")
    assert type(tokenizer) is type(AutoTokenizer.from_pretrained(stories3m))
    model = load_pruned(tmp_path / "out", dtype=torch.float32)
    assert model.num_parameters() == summary.parameters_after
    line = "Once upon a time, there was a little girl"
    text = tokenizer(line, return_tensors="pt").input_ids
    assert text.tolist() == [AutoTokenizer.from_pretrained(stories3m)(line).input_ids]
    assert relative_difference(logits_of(model, text), logits_of(expected, text)) <= LIMIT
    assert torch.equal(greedy(model, text), greedy(expected, text))
    assert load_pruned(tmp_path / "out").dtype == torch.bfloat16


def test_dense_models_load_too(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense") as parent:
        expected = AutoModelForCausalLM.from_pretrained(parent.folder)
    model = load_pruned(str(tmp_path / "dense"))
    assert torch.equal(logits_of(model, tokens()), logits_of(expected, tokens()))
