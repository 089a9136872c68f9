"""Cutting the removed units out of one tensor."""

from __future__ import annotations

import pytest
import torch
from tiny_models import BIASES, Tiny, random_mask, tiny_llama

from frugal_bonsai.model.cut import cut_shape, cut_tensor, kept_indices, slices_by_tensor
from frugal_bonsai.model.units import KeepMask, UnitGroup, UnitSlice, UnitTable


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_llama(tmp_path_factory.mktemp("cut") / "m", **BIASES)


def test_each_tensor_loses_exactly_its_units(tiny: Tiny) -> None:
    """The expected rows and columns are listed by name, not taken from the unit table."""
    mask = random_mask(tiny.spec, seed=4)
    cuts = slices_by_tensor(tiny.spec.table)
    attention, ffn = tiny.spec.table.of_layer(1)
    kv, channels = mask.of(attention), mask.of(ffn)
    query, head = kv.repeat_interleave(8), kv.repeat_interleave(4)
    expected = {
        "self_attn.q_proj.weight": (query, slice(None)),
        "self_attn.q_proj.bias": (query,),
        "self_attn.k_proj.weight": (head, slice(None)),
        "self_attn.v_proj.bias": (head,),
        "self_attn.o_proj.weight": (slice(None), query),
        "self_attn.o_proj.bias": (slice(None),),
        "mlp.gate_proj.weight": (channels, slice(None)),
        "mlp.up_proj.bias": (channels,),
        "mlp.down_proj.weight": (slice(None), channels),
        "mlp.down_proj.bias": (slice(None),),
        "input_layernorm.weight": (slice(None),),
    }
    for name, index in expected.items():
        full = f"model.layers.1.{name}"
        dense = tiny.checkpoint.read(full)
        pieces = cuts.get(full, [])
        found = cut_tensor(dense, pieces, mask)
        assert torch.equal(found, dense[index]), name
        assert found.is_contiguous()
        assert cut_shape(tuple(dense.shape), pieces, mask) == tuple(found.shape)


def test_nothing_removed_changes_nothing(tiny: Tiny) -> None:
    cuts = slices_by_tensor(tiny.spec.table)
    for name, pieces in cuts.items():
        dense = tiny.checkpoint.read(name)
        assert torch.equal(cut_tensor(dense, pieces, KeepMask(tiny.spec.table)), dense)


def test_fused_tensor_keeps_what_lies_around_and_between() -> None:
    """Two groups in one tensor (fused QKV), with rows before, between and after them."""

    def group(kind: str, count: int, start: int, width: int) -> UnitGroup:
        piece = UnitSlice(tensor="fused", axis=0, width=width, start=start)
        return UnitGroup(
            layer=0,
            kind=kind,
            count=count,
            unit_parameters=width,
            slices=(piece,),
            output=kind,
            output_weight="fused",
            columns_per_unit=1,
        )

    table = UnitTable((group("a", 2, 1, 3), group("b", 2, 8, 2)))
    mask = KeepMask(table).without(torch.tensor([0, 3]))
    pieces = slices_by_tensor(table)["fused"]
    assert kept_indices(13, pieces, mask).tolist() == [0, 4, 5, 6, 7, 8, 9, 12]
    rows = torch.arange(13.0)[:, None].expand(13, 2)
    assert cut_tensor(rows, pieces, mask)[:, 0].tolist() == [0, 4, 5, 6, 7, 8, 9, 12]
    assert cut_shape((13, 2), pieces, mask) == (8, 2)
