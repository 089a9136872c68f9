"""A checkpoint's layers as they are, and the masked parent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import BIASES, Tiny, random_mask, tiny_llama

from frugal_bonsai.stream.source import ALIGNMENT_BYTES, CheckpointSource, align


def _read(source: CheckpointSource, layer: int) -> dict[str, torch.Tensor]:
    # Rubbish behind and around shows what was not written.
    buffer = torch.full((source.layer_bytes(layer),), 0xAB, dtype=torch.uint8)
    source.read(layer, buffer)
    return {record.name: record.view(buffer).clone() for record in source.records(layer)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_those_of_the_checkpoint(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny = tiny_llama(tmp_path / "m", dtype=dtype, **BIASES)
    source = tiny.source()
    assert source.layers == 3
    for layer in range(3):
        found = _read(source, layer)
        assert set(found) == set(tiny.spec.layer_tensors[layer])
        for name, value in found.items():
            dense = tiny.checkpoint.read(tiny.spec.prefix(layer) + name)
            assert value.dtype == dtype and torch.equal(value, dense), name


def test_records_are_aligned_and_do_not_overlap(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "m", dtype=torch.bfloat16, **BIASES).source()
    records = source.records(1)
    assert [align(x) for x in (0, 1, 64, 65)] == [0, 64, 64, 128]
    end = 0
    for record in records:
        assert record.start % ALIGNMENT_BYTES == 0 and record.start >= end
        assert record.size_bytes == 2 * record.elements
        end = record.start + record.size_bytes
    assert end <= source.layer_bytes(1)


def test_mask_zeroes_the_removed_columns_and_nothing_else(tmp_path: Path) -> None:
    tiny = tiny_llama(tmp_path / "m", **BIASES)
    mask = random_mask(tiny.spec)
    dense, masked = _read(tiny.source(), 2), _read(tiny.source(mask=mask), 2)
    attention, ffn = tiny.spec.table.of_layer(2)
    for name, value in dense.items():
        expected = value.clone()
        if name == "self_attn.o_proj.weight":
            expected[:, ~mask.of(attention).repeat_interleave(8)] = 0
        if name == "mlp.down_proj.weight":
            expected[:, ~mask.of(ffn)] = 0
        assert torch.equal(masked[name], expected), name
    assert not torch.equal(masked["mlp.down_proj.weight"], dense["mlp.down_proj.weight"])


def _refit(tiny: Tiny, columns: int) -> torch.Tensor:
    return torch.randn(tiny.spec.hidden, columns, generator=torch.Generator().manual_seed(2))


def test_refit_goes_to_the_kept_columns_in_the_sources_dtype(tmp_path: Path) -> None:
    tiny = tiny_llama(tmp_path / "m", dtype=torch.bfloat16)
    mask = random_mask(tiny.spec)
    _, ffn = tiny.spec.table.of_layer(1)
    refit_HK = _refit(tiny, mask.kept(ffn))
    source = tiny.source(mask=mask, refit={ffn.output_weight: lambda: refit_HK})
    found = _read(source, 1)["mlp.down_proj.weight"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[:, mask.of(ffn)], refit_HK.bfloat16())
    assert not found[:, ~mask.of(ffn)].any()
    untouched = _read(tiny.source(mask=mask), 1)
    attention = _read(source, 1)["self_attn.o_proj.weight"]
    assert torch.equal(attention, untouched["self_attn.o_proj.weight"])
