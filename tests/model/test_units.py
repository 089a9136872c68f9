"""Units, the flat vector over them, and the mask of kept units."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import BIASES, MHA, random_mask, tiny_llama

from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.mask_json import mask_from_json, mask_to_json
from frugal_bonsai.model.units import (
    ATTENTION,
    FFN,
    KeepMask,
    UnitGroup,
    UnitSlice,
    UnitTable,
    iterate_layers,
)


def _group(layer: int, kind: str, count: int, parameters: int, columns: int) -> UnitGroup:
    name = f"layers.{layer}.{kind}.weight"
    return UnitGroup(
        layer=layer,
        kind=kind,
        count=count,
        unit_parameters=parameters,
        slices=(UnitSlice(tensor=name, axis=1, width=columns),),
        output=kind,
        output_weight=name,
        columns_per_unit=columns,
    )


def _table() -> UnitTable:
    return UnitTable(
        (
            _group(0, ATTENTION, 2, 100, 4),
            _group(0, FFN, 5, 10, 1),
            _group(1, ATTENTION, 2, 100, 4),
            _group(1, FFN, 3, 10, 1),
        )
    )


def test_flat_vector() -> None:
    table = _table()
    assert table.starts == (0, 2, 7, 9, 12)
    assert table.units == 12
    assert table.parameters == 4 * 100 + 8 * 10
    assert table.kinds == (ATTENTION, FFN)
    assert [table.span(g) for g in table.groups] == [
        slice(0, 2),
        slice(2, 7),
        slice(7, 9),
        slice(9, 12),
    ]
    assert table.unit_parameters_N().tolist() == [100.0] * 2 + [10.0] * 5 + [100.0] * 2 + [10.0] * 3
    assert [table.position(g) for g in table.groups] == [0, 1, 2, 3]
    assert [g.name for g in table.of_layer(1)] == ["layer 1 attention", "layer 1 ffn"]
    assert [(layer, len(groups)) for layer, groups in iterate_layers(table)] == [(0, 2), (1, 2)]


def test_mask_keeps_all_at_first_and_removes_by_flat_index() -> None:
    table = _table()
    dense = KeepMask(table)
    assert dense.removed_parameters() == 0 and dense.keep_N.all()
    mask = dense.without(torch.tensor([1, 2, 6, 11]))
    assert dense.keep_N.all(), "without() must not change the mask it is called on"
    assert mask.counts() == {ATTENTION: [1, 2], FFN: [3, 2]}
    assert mask.removed_parameters() == 100 + 3 * 10
    attention, ffn = table.groups[:2]
    assert mask.of(attention).tolist() == [True, False]
    assert mask.columns(attention).tolist() == [True] * 4 + [False] * 4
    assert mask.columns(ffn).tolist() == [False, True, True, True, False]
    assert mask.kept(ffn) == 3
    assert repr(mask) == "KeepMask(8 of 12 kept)"


def test_group_part_is_a_view() -> None:
    table = _table()
    mask = KeepMask(table)
    mask.of(table.groups[1])[2] = False
    assert mask.keep_N.nonzero().flatten().tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]


def test_equality_is_by_content() -> None:
    table = _table()
    first, second = KeepMask(table), KeepMask(_table())
    assert first == second
    assert first != first.without(torch.tensor([0]))
    assert first != "mask"
    with pytest.raises(TypeError):
        hash(first)


@pytest.mark.parametrize("keep", [torch.ones(11, dtype=torch.bool), torch.ones(12)])
def test_wrong_mask_is_refused(keep: torch.Tensor) -> None:
    with pytest.raises(OptionError, match=r"expected bool \[12\], found torch"):
        KeepMask(_table(), keep)


@given(st.lists(st.booleans(), min_size=12, max_size=12))
def test_json_round_trip(keep: list[bool]) -> None:
    table = _table()
    mask = KeepMask(table, torch.tensor(keep))
    removed = mask_to_json(mask)
    assert mask_from_json(table, removed) == mask
    assert sum(len(x) for layers in removed.values() for x in layers) == keep.count(False)


@pytest.mark.parametrize(
    ("removed", "text"),
    [
        ({FFN: [[0]]}, r"\['ffn'\] lists 1 layers, the model has 2"),
        ({"expert": [[0]]}, r"\['expert'\] lists 1 layers, the model has 0"),
        ({FFN: [[], [3]]}, r"\['ffn'\], layer 1: names unit 3, .*0\.\.2"),
        ({ATTENTION: [[-1], []]}, r"layer 0: names unit -1, .*0\.\.1"),
    ],
)
def test_json_of_another_model_is_refused(removed: dict[str, list[list[int]]], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        mask_from_json(_table(), removed)


@pytest.mark.parametrize("changes", [{}, MHA, BIASES, {**MHA, **BIASES}])
def test_removed_parameters_are_those_of_a_really_smaller_model(
    changes: dict[str, object], tmp_path: Path
) -> None:
    """Compare with Hugging Face's modules of one KV group and seven channels fewer per layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = tiny_llama(tmp_path / "dense", **changes).spec
    mask = KeepMask(spec.table)
    for group in spec.table.groups:
        mask.of(group)[: 1 if group.kind == ATTENTION else 7] = False
    values = dict(spec.config)
    values["num_attention_heads"] -= spec.query_heads_per_group
    values["num_key_value_heads"] -= 1
    values["intermediate_size"] -= 7
    smaller = LlamaForCausalLM(LlamaConfig(**values))
    left = sum(p.numel() for layer in smaller.model.layers for p in layer.parameters())
    assert spec.block_parameters - mask.removed_parameters() == left


def test_random_mask_helper_keeps_a_unit_everywhere(tmp_path: Path) -> None:
    spec = tiny_llama(tmp_path / "m").spec
    mask = random_mask(spec)
    assert all(0 < mask.kept(g) < g.count for g in spec.table.groups)
