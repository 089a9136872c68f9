"""The numbers of units that an output layout can hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import LARGEST_TILE_STEP, PER_LAYER, UNIFORM, layout_rules
from frugal_bonsai.model.units import ATTENTION, FFN


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return tiny_llama(tmp_path_factory.mktemp("layout") / "m").spec


def test_per_layer_holds_any_count(spec: ModelSpec) -> None:
    rules = layout_rules(spec, PER_LAYER)
    assert not rules.uniform and rules.tile == 1
    assert rules.legal_counts(ATTENTION, 3) == (1, 2, 3)
    assert rules.legal_counts(FFN, 5) == (1, 2, 3, 4, 5)


def test_tile_bounds_ffn_counts_but_the_dense_count_stays_legal(spec: ModelSpec) -> None:
    rules = layout_rules(spec, PER_LAYER, tile=8)
    assert rules.legal_counts(FFN, 20) == (8, 16, 20)
    assert rules.legal_counts(FFN, 16) == (8, 16)
    assert rules.legal_counts(FFN, 5) == (5,)
    assert rules.legal_counts(ATTENTION, 2) == (1, 2)


def test_uniform_head_counts_are_those_that_transformers_accepts(tmp_path: Path) -> None:
    """Hidden size 24, two query heads per group: 5 groups are 10 heads, and 24 % 10 != 0."""
    changes = {"num_attention_heads": 12, "num_key_value_heads": 6}
    spec = tiny_llama(tmp_path / "m", **changes).spec
    rules = layout_rules(spec, UNIFORM)
    assert rules.uniform
    accepted = []
    for groups in range(1, 7):
        values = {**spec.config, "num_attention_heads": 2 * groups, "num_key_value_heads": groups}
        try:
            LlamaForCausalLM(LlamaConfig(**values))
        except Exception as error:
            assert "multiple of the number of attention heads" in str(error)
        else:
            accepted.append(groups)
    assert list(rules.attention_counts) == accepted == [1, 2, 3, 4, 6]
    assert layout_rules(spec, PER_LAYER).attention_counts == (1, 2, 3, 4, 5, 6)


def test_default_tile_is_the_largest_whose_step_is_two_points(spec: ModelSpec) -> None:
    # A channel of every layer is 1/44th of the blocks here: no tile fits, one is the smallest.
    assert layout_rules(spec, UNIFORM).tile == 1
    ffn = tuple(g for g in spec.table.groups if g.kind == FFN)
    channel = sum(g.unit_parameters for g in ffn)
    for times, expected in ((8, 8), (9.9, 8), (3, 2), (1000, 64)):
        blocks = times * channel / LARGEST_TILE_STEP
        large = replace(spec, layer_tensors=({"all": (int(blocks) + 1,)},))
        assert layout_rules(large, UNIFORM).tile == expected
    assert layout_rules(large, UNIFORM, default_tile=128).tile == 128
    assert layout_rules(large, PER_LAYER).tile == 1


@pytest.mark.parametrize("tile", [0, -1, 21])
def test_tile_that_the_ffn_cannot_hold(spec: ModelSpec, tile: int) -> None:
    with pytest.raises(OptionError, match=rf"--tile: {tile} is outside 1\.\.20"):
        layout_rules(spec, UNIFORM, tile=tile)


def test_unknown_layout(spec: ModelSpec) -> None:
    with pytest.raises(OptionError, match="--layout: 'ragged' is not one of uniform, per-layer"):
        layout_rules(spec, "ragged")
