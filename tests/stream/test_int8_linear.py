"""Products with int8 codes as they are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import CPU, Tiny, random_windows, tiny_llama
from torch.func import functional_call
from torch.nn.functional import linear

from frugal_bonsai.int8 import (
    PRODUCT_TOKENS,
    dequantise_into,
    product_scratch_bytes,
    quantise_rows,
)
from frugal_bonsai.stream.engine import INT8_PRODUCTS, Engine
from frugal_bonsai.stream.int8_linear import Int8Weight
from frugal_bonsai.stream.layers import CODES, LayerStream
from frugal_bonsai.stream.scratch import Scratch
from frugal_bonsai.stream.store import INT8, build_store

TOKENS, COLUMNS, ROWS = 2 * PRODUCT_TOKENS + 3, 40, 24


@pytest.fixture
def weights() -> tuple[Int8Weight, torch.Tensor]:
    """The codes of a random matrix, and the matrix that they stand for."""
    generator = torch.Generator().manual_seed(0)
    codes, scales = quantise_rows(torch.randn(ROWS, COLUMNS, generator=generator))
    dense = dequantise_into(torch.empty(ROWS, COLUMNS), codes, scales)
    return Int8Weight(codes, scales, Scratch(CPU)), dense


def _inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("outlier", [1.0, 300.0])
def test_two_digits_keep_what_one_would_lose(
    weights: tuple[Int8Weight, torch.Tensor], outlier: float
) -> None:
    weight, dense = weights
    inputs = _inputs(3, 7, COLUMNS)
    inputs[..., 5] *= outlier
    expected = linear(inputs, dense)
    found = linear(inputs, weight)
    assert type(found) is torch.Tensor and found.dtype == torch.float32
    step = inputs.abs().amax(-1, keepdim=True) / 127 / 254  # of the second digit
    bound = 0.51 * step * dense.abs().sum(1)
    assert ((found - expected).abs() <= bound + 1e-5 * expected.abs().max()).all()
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_token_does_not_see_its_neighbours(weights: tuple[Int8Weight, torch.Tensor]) -> None:
    weight, _ = weights
    inputs = _inputs(TOKENS, COLUMNS)
    inputs[4] *= 1e4
    together = linear(inputs, weight)
    for token in (0, 4, PRODUCT_TOKENS - 1, PRODUCT_TOKENS, TOKENS - 1):
        assert torch.equal(linear(inputs[token : token + 1], weight)[0], together[token])


def test_zero_tokens_and_biases(weights: tuple[Int8Weight, torch.Tensor]) -> None:
    weight, _ = weights
    bias = torch.arange(float(ROWS))
    found = linear(torch.zeros(2, COLUMNS), weight, bias)
    assert torch.equal(found, bias.expand(2, ROWS))


def test_other_dtypes_come_back_as_they_went_in(weights: tuple[Int8Weight, torch.Tensor]) -> None:
    weight, dense = weights
    inputs = _inputs(9, COLUMNS).bfloat16()
    found = linear(inputs, weight)
    assert found.dtype == torch.bfloat16
    expected = linear(inputs.float(), dense)
    assert ((found.float() - expected).abs() <= 2**-8 * expected.abs() + 1e-3).all()


def test_a_module_takes_it_and_the_scratch_is_as_large_as_said(
    weights: tuple[Int8Weight, torch.Tensor],
) -> None:
    weight, dense = weights
    module = torch.nn.Linear(COLUMNS, ROWS, bias=False, device="meta")
    inputs = _inputs(TOKENS, COLUMNS)
    found = functional_call(module, {"weight": weight}, (inputs,))
    assert torch.allclose(found, linear(inputs, dense), atol=1e-3)
    held = sum(b.numel() * b.element_size() for b in weight.scratch._buffers.values())
    assert held == product_scratch_bytes(PRODUCT_TOKENS, ROWS, COLUMNS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_llama(tmp_path_factory.mktemp("int8") / "m", attention_bias=True)


def _losses(engine: Engine, folder: Path, windows_NS: torch.Tensor) -> torch.Tensor:
    store = build_store(folder / "store", engine.checkpoint, engine.spec, weights=INT8)
    head = engine.evaluation_head(folder / "head")
    with engine.evaluation_stream(store) as stream:
        return engine.sweep.losses(stream, head, windows_NS)


def test_a_sweep_gives_the_losses_of_the_dequantised_store(tiny: Tiny, tmp_path: Path) -> None:
    windows = random_windows(5, 9)
    exact = _losses(tiny.engine(head_rows=20), tmp_path / "float", windows)
    found = _losses(tiny.engine(head_rows=20, arithmetic=INT8_PRODUCTS), tmp_path / "int8", windows)
    assert not torch.equal(found, exact)
    # The head is int8 too, the only part that is not the same weights.
    assert (found - exact).abs().max() < 0.02
    assert sorted(p.name for p in (tmp_path / "int8/head").iterdir()) == [
        f"layer_0000{chunk}.safetensors" for chunk in range(3)
    ]
    assert not (tmp_path / "float/head").exists(), "the float head is read from the checkpoint"


def test_a_window_does_not_see_its_neighbours(tiny: Tiny, tmp_path: Path) -> None:
    windows = random_windows(6, 9)
    engine = tiny.engine(micro_batch=4, arithmetic=INT8_PRODUCTS)
    together = _losses(engine, tmp_path / "six", windows)
    alone = _losses(engine, tmp_path / "one", windows[4:5])
    assert (alone[0] - together[4]).abs().max() < 1e-6 * together.abs().max()


def test_no_dequantised_layer_is_held(tiny: Tiny, tmp_path: Path) -> None:
    store = build_store(tmp_path, tiny.checkpoint, tiny.spec, weights=INT8)
    with LayerStream(store, device=CPU, dtype=torch.float32, products=CODES) as stream:
        # Norms and biases alone are stored in another dtype than the compute dtype's.
        small = sum(r.elements for r in store.records(0) if r.scales_start is None)
        assert stream._dense.numel() <= 4 * small + 64 * len(store.records(0))
        for _, parameters in stream.visit():
            kinds = {type(parameters[n]) for n in parameters if n.endswith("proj.weight")}
            assert kinds == {Int8Weight}
