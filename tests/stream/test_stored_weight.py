"""Weights that are multiplied as they are stored, some rows dense at a time."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from tiny_models import CPU, random_windows, relative, tiny_llama
from torch.nn.functional import linear

from frugal_bonsai import row_blocks
from frugal_bonsai.int8 import dequantise_into, quantise_rows
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.row_blocks import block_bytes, block_rows, multiplied_in_blocks
from frugal_bonsai.stream.layers import DENSE, ROWS, LayerStream
from frugal_bonsai.stream.scratch import Scratch
from frugal_bonsai.stream.store import INT8, build_store
from frugal_bonsai.stream.stored_weight import RowsWeight, dense_weight, multiply_into

# Three blocks of 512 rows and a part of one.
ROWS_O, COLUMNS = 3 * 512 + 72, 2048
_MULTIPLY = RowsWeight.multiply_into


def _inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["int8", "bfloat16"])
def weights(request: pytest.FixtureRequest) -> tuple[RowsWeight, torch.Tensor]:
    """A stored matrix, and the dense one that it stands for."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS_O, COLUMNS, generator=generator)
    if request.param == "bfloat16":
        return RowsWeight(weight.bfloat16(), None, Scratch(CPU)), weight.bfloat16().float()
    codes, scales = quantise_rows(weight)
    dense = dequantise_into(torch.empty(ROWS_O, COLUMNS), codes, scales)
    return RowsWeight(codes, scales, Scratch(CPU)), dense


def test_which_weights_are_multiplied_in_blocks() -> None:
    assert block_rows(2048, 4) == 512 and block_bytes((8192, 2048), 4) == 2**22
    assert block_rows(14336, 4) == 256, "fewer rows make slow products"
    assert block_rows(1000, 4) == 1024, "in multiples of 256"
    assert multiplied_in_blocks((513, 2048), 4) and not multiplied_in_blocks((512, 2048), 4)
    assert not multiplied_in_blocks((8192,), 4), "a norm is no weight of a product"


@pytest.mark.parametrize("tokens", [(64,), (2, 129), (700,)])
def test_products_are_those_of_the_dense_weight(
    tokens: tuple[int, ...], weights: tuple[RowsWeight, torch.Tensor]
) -> None:
    """On both sides of 256 tokens; the last block has fewer rows."""
    weight, dense = weights
    inputs, bias = _inputs(*tokens, COLUMNS), _inputs(ROWS_O)
    found, expected = linear(inputs, weight, bias), linear(inputs, dense) + bias
    assert type(found) is torch.Tensor and found.shape == (*tokens, ROWS_O)
    assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("tokens", [1, 2, 31])
def test_a_few_tokens(tokens: int, weights: tuple[RowsWeight, torch.Tensor]) -> None:
    weight, dense = weights
    inputs = _inputs(tokens, COLUMNS)
    assert relative(linear(inputs, weight), linear(inputs, dense)) < 1e-5


def test_a_token_does_not_see_its_neighbours(weights: tuple[RowsWeight, torch.Tensor]) -> None:
    weight, _ = weights
    inputs = _inputs(300, COLUMNS)
    others = inputs.clone()
    others[:7] *= 100
    others[8:] = 1.0
    assert torch.equal(linear(inputs, weight)[7], linear(others, weight)[7])


def test_no_more_than_a_block_is_dense(weights: tuple[RowsWeight, torch.Tensor]) -> None:
    weight, _ = weights
    linear(_inputs(300, COLUMNS), weight)
    held = sum(buffer.nbytes for buffer in weight.scratch._buffers.values())
    assert held == block_bytes(tuple(weight.shape), 4) < ROWS_O * COLUMNS * 4


def test_results_in_memory_of_the_callers(weights: tuple[RowsWeight, torch.Tensor]) -> None:
    weight, dense = weights
    inputs, room = _inputs(300, COLUMNS), torch.full((300, ROWS_O), torch.nan)
    assert multiply_into(inputs, weight, room) is room
    assert relative(room, inputs @ dense.T) < 1e-6
    again = torch.full((300, ROWS_O), torch.nan)
    assert relative(multiply_into(inputs, dense, again), inputs @ dense.T) < 1e-6


def test_the_dense_weight(weights: tuple[RowsWeight, torch.Tensor]) -> None:
    weight, dense = weights
    assert torch.equal(dense_weight(weight), dense)
    assert dense_weight(dense) is dense


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of eight rows, so that a tiny model has weights of several."""
    monkeypatch.setattr(row_blocks, "_LEAST_ROWS", 8)
    monkeypatch.setattr(row_blocks, "_BLOCK_BYTES", 1)


@pytest.mark.usefixtures("small_blocks")
def test_a_stream_holds_no_large_weight_dense(tmp_path: Path) -> None:
    tiny = tiny_llama(tmp_path / "m", dtype=torch.bfloat16)
    store = build_store(tmp_path / "s", tiny.checkpoint, tiny.spec, weights=INT8)
    with LayerStream(store, device=CPU, dtype=torch.float32, products=ROWS) as stream:
        for layer, parameters in stream.visit():
            large = {n for n, value in parameters.items() if isinstance(value, RowsWeight)}
            assert large == {
                r.name for r in store.records(layer) if len(r.shape) == 2 and r.shape[0] > 8
            }
            assert len(large) > 3
            rest = sum(r.elements for r in store.records(layer) if r.name not in large)
            assert stream._dense.numel() <= 4 * rest + 64 * len(store.records(layer))
            rows = {name: dense_weight(value).clone() for name, value in parameters.items()}
            with LayerStream(store, device=CPU, dtype=torch.float32, products=DENSE) as plain:
                wanted = next(found for at, found in plain.visit() if at == layer)
            assert all(torch.equal(value, wanted[name]) for name, value in rows.items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", [INT8, None])
def test_losses_are_those_of_dense_layers(
    weights: str | None, tied: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Layers and head of a store and of a checkpoint, windows in several micro-batches."""
    tiny = tiny_llama(tmp_path / "m", dtype=torch.bfloat16, std=0.1, tie_word_embeddings=tied)
    tokens = random_windows(5, 9)

    def losses() -> torch.Tensor:
        engine = tiny.engine(micro_batch=2, head_rows=20)
        source = tiny.source(mask=KeepMask(tiny.spec.table))
        if weights is not None:
            source = build_store(tmp_path / "s", tiny.checkpoint, tiny.spec, weights=weights)
        with engine.stream(source) as stream:
            return engine.losses(stream, tokens, "losses")

    dense = losses()
    request.getfixturevalue("small_blocks")
    with patch.object(RowsWeight, "multiply_into", autospec=True) as multiply:
        multiply.side_effect = _MULTIPLY
        in_blocks = losses()
    # Three layers of seven projections and three chunks of the head, in three micro-batches each.
    assert multiply.call_count >= 3 * 3 * 7
    assert relative(in_blocks, dense) < 1e-6
