"""A layer's operations for a share of its units, and the seconds of each kind of work."""

from __future__ import annotations

import profiles
import pytest

from frugal_bonsai.hardware.throughput import LayerOperations, Rates, int8_wins

# H 4, one KV group of two query heads of 2, I 6.
LAYER = LayerOperations(
    projections=2 * (4 * (4 + 2 + 2) + 16 + 48 + 24),
    attention=2 * 4,
    traffic_bytes=800.0,
    array_bytes=(8000.0, 12000.0),
    inputs=5 * 4 + 4 + 6,
    outputs=4 + 2 * 2 + 2 * 4 + 2 * 6,
    query=4,
    ffn=6,
)
RATES = Rates(profiles.cpu())


def test_a_share_of_the_units() -> None:
    half = LAYER.kept(0.5)
    assert (half.projections, half.attention) == (LAYER.projections / 2, 4)
    assert (half.query, half.ffn) == (2, 3)
    # The residual stream keeps its width.
    assert (half.traffic_bytes, half.inputs) == (600, LAYER.inputs * 0.75)
    assert LAYER.kept(1.0) == LAYER


@pytest.mark.parametrize(("micro_batch", "fresh"), [(2, 0), (4, 12000), (8, 20000)])
def test_only_large_blocks_are_new_ones(micro_batch: int, fresh: float) -> None:
    # 4,096 tokens: 12,000 bytes a token are 47 MiB, 8,000 are 31.
    found = RATES.forward(LAYER, 1024, 8, micro_batch=micro_batch).elementwise
    assert found == pytest.approx(8 * 1024 * (800 / 2e10 + fresh / 2e9))


def test_a_layers_forward() -> None:
    found = RATES.forward(LAYER, 1024, 8, micro_batch=4)
    tokens = 8 * 1024
    # Products, causal attention, two calls of the layer.
    expected = tokens * LAYER.projections / 1e11 + tokens * 1024 * 8 / 5e10 + 2 * 1e-3
    assert found.compute == pytest.approx(expected)
    assert found.elementwise == pytest.approx(tokens * (800 / 2e10 + 12000 / 2e9))
    assert (found.disk, found.copy) == (0, 0)


def test_two_digits_of_int8() -> None:
    found = RATES.projections(1e9, 1e6, 2e6, int8=True)
    assert found.compute == pytest.approx(2e9 / 8e11)
    assert found.elementwise == pytest.approx((66e6 + 36 * 2e6) / 2e10)


def test_solves_and_gram_matrices() -> None:
    assert RATES.cholesky(6).compute == pytest.approx(72 / 4e10)
    assert RATES.cholesky(6, 4).compute == pytest.approx((72 + 2 * 36 * 4) / 4e10)
    assert RATES.gram(6, 4, 20).compute == pytest.approx(2 * 6 * 10 * 20 / 1e11)
    # 16-bit activations are multiplied as they are where sums are in fp32.
    near = Rates(profiles.cuda())
    assert near.gram(6, 0, 20).compute == pytest.approx(2 * 36 * 20 / 1e14)
    assert near.products(1e9, "fp32").compute == pytest.approx(1e9 / 4e13)


def test_copies_take_time_where_the_device_has_its_own_memory() -> None:
    assert RATES.copy(1e9).copy == 0 and Rates(profiles.cuda()).copy(1e9).copy == 1e9 / 2e10


def test_int8_wins_where_both_digits_and_their_making_cost_less() -> None:
    def wins(int8: float, memory: float) -> bool:
        products = {"fp32": 1e11, "int8": int8}
        return int8_wins(LAYER, profiles.cpu(products=products, memory_bytes_per_second=memory))

    digits = 66 * LAYER.inputs + 36 * LAYER.outputs
    enough = digits / (LAYER.projections / 1e11 - 2 * LAYER.projections / 8e11)
    assert wins(8e11, 1.01 * enough) and not wins(8e11, 0.99 * enough)
    assert not wins(2e11, 1e30)
    assert not int8_wins(LAYER, profiles.cpu(products={"fp32": 1e11}))
