"""Formulas of operations and bytes, against small cases computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_family

from frugal_bonsai.checkpoint.locate import find_model
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.hardware import cost
from frugal_bonsai.hardware.cost import Batch, Cost, LayerWidths, layer_widths
from frugal_bonsai.model.family import ModelSpec, describe_model

# H 4, one KV group of two query heads of 2, I 6.
SMALL = LayerWidths(
    hidden=4,
    query=4,
    key=2,
    ffn=6,
    attention_in=4 * (4 + 2 + 2),
    attention_out=16,
    ffn_in=48,
    ffn_out=24,
    parameters=128,
    query_unit=4,
)
BATCH = Batch(window=10, micro_batch=2, element_bytes=4)


def example() -> ModelSpec:
    checkpoint = Checkpoint.open(find_model("example"))
    return describe_model(checkpoint.config, checkpoint.shapes)


def test_widths_of_the_example() -> None:
    w = layer_widths(example())
    assert (w.hidden, w.query, w.key, w.ffn, w.query_unit) == (192, 256, 128, 512, 64)
    assert w.attention_in == 192 * (256 + 128 + 128)
    assert (w.attention_out, w.ffn_in, w.ffn_out) == (192 * 256, 2 * 192 * 512, 192 * 512)
    assert w.parameters == w.projections + 2 * 192


def test_a_share_of_the_units() -> None:
    half = layer_widths(example()).kept(0.5)
    assert (half.hidden, half.query, half.ffn, half.query_unit) == (192, 128, 256, 64)
    assert half.projections == layer_widths(example()).projections / 2


def test_costs_add_up() -> None:
    both = Cost(products=3, read=1) + Cost(products=4, write=2)
    assert both == Cost(products=7, read=1, write=2)
    assert both * 2 == Cost(products=14, read=2, write=4)


def test_a_layer() -> None:
    found = cost.layer_cost(SMALL, BATCH, 20)
    # Every parameter but the norms multiplies every token once.
    assert found.products == 2 * (32 + 16 + 48 + 24) * 20
    assert found.attention == 2 * 10 * 4 * 20
    # 7 H + 10 (q + k); 7 H + 5 I; 8 H; inputs 5 H + q + I and outputs q + 2 k + 2 I + 2 H of the
    # projections; four bytes each.
    assert found.traffic == (28 + 60 + 28 + 30 + 32 + 30 + 28) * 4 * 20
    assert (found.calls, found.fresh) == (1, 0)
    masked = cost.layer_cost(SMALL, BATCH, 20, masked=True)
    assert masked.traffic - found.traffic == 2 * (4 + 6) * 4 * 20


def test_only_large_blocks_are_new_ones() -> None:
    # 4,096 tokens: 6,000 columns are 98 MB, 2,000 are 33 MB, just below 32 MiB.
    batch = Batch(window=1024, micro_batch=4, element_bytes=4)
    assert batch.is_fresh(6000) and batch.is_fresh(2048) and not batch.is_fresh(2000)
    assert batch.fresh(1024, wide=(6000, 4), narrow=(2000, 3)) == 1024 * 6000 * 4 * 4


@pytest.mark.parametrize(("stored", "traffic"), [(4, 0), (2, 128 * 6), (1, 128 * 13)])
def test_dequantising(stored: int, traffic: int) -> None:
    # As stored: read; int8 written, then scaled in place (read and written again).
    assert cost.dequantise_cost(128, stored, 4).traffic == traffic
    # In blocks what is written stays in the cache.
    in_blocks = cost.dequantise_cost(128, stored, 4, in_blocks=True).traffic
    assert in_blocks == (128 * (stored + 4) if stored < 4 else 0)


def test_the_head_in_chunks_of_the_vocabulary() -> None:
    spec = example()
    one = cost.head_cost(spec, BATCH, 100, rows=4096, chunk_tokens=100)
    assert one.products == 2 * 192 * 4096 * 100
    assert one.traffic == 24 * 4096 * 100 + (9 + 2) * 192 * 4 * 100
    four = cost.head_cost(spec, BATCH, 100, rows=1024, chunk_tokens=100)
    assert four.products == one.products
    assert four.traffic - one.traffic == 3 * 2 * 192 * 4 * 100
    assert one.fresh == 0
    large = cost.head_cost(spec, BATCH, 100, rows=4096, chunk_tokens=2048)
    assert large.fresh == 4 * 4096 * 100


def test_gram_matrices_and_the_exact_prior() -> None:
    assert cost.gram_cost(6, 20).gram_products == 2 * 36 * 20
    # Factor and inverse of 4 x 4 and 6 x 6; the one KV group's block of 4 with 4 right sides.
    block = 2 * 64 / 3 + 2 * 16 * 4
    alone = cost.exact_prior_cost(SMALL, factored=False)
    assert alone.solves == pytest.approx(2 * (64 + 216) / 3 + block)
    assert alone.fp32_products == 16 * 4
    shared = cost.exact_prior_cost(SMALL, factored=True)
    assert shared.solves == pytest.approx((64 + 216) / 3 + block)


def test_refits() -> None:
    outputs = cost.refit_outputs_cost(SMALL, 20)
    assert outputs.gram_products == sum(2 * c * c * 20 + 2 * c * 4 * 20 for c in (4, 6))
    assert outputs.fp32_products == sum(2 * c * c * 4 for c in (4, 6))
    assert outputs.solves == pytest.approx(sum(c**3 / 3 + 2 * c * c * 4 for c in (4, 6)))
    inputs = cost.refit_inputs_cost(SMALL, 20)
    rows = 4 + 2 + 2 + 6 + 6
    assert (inputs.gram_products, inputs.fp32_products) == (8 * 16 * 20, 4 * 16 * rows)
    assert inputs.solves == pytest.approx(2 * 64 / 3 + 2 * 16 * rows)


def test_stand_ins() -> None:
    found = cost.stand_ins_cost(SMALL, 0.25, 20, 4)
    assert found.fp32_products == 2 * (1 * 3 + 1.5 * 4.5) * 20
    # 10 columns: three quarters gathered, a quarter gathered, guessed and chosen.
    assert found.traffic == (2 * 7.5 + 6 * 2.5) * 4 * 20
    near = cost.stand_ins_cost(SMALL, 0.25, 20, 2)
    assert (near.products, near.fp32_products) == (found.fp32_products, 0)
    made = cost.make_stand_ins_cost(SMALL, 0.5)
    # Pools of 2 of 4 and 3 of 6: rows of the inverse, a factor, substitutions.
    assert made.fp32_products == 2 * (2 * 4 * 4 + 3 * 6 * 6)
    assert made.solves == pytest.approx(8 / 3 + 2 * 4 * 2 + 27 / 3 + 2 * 9 * 3)


def test_refinement() -> None:
    given = {"steps": 2, "blocks": 1, "iterations": 3}
    kept = cost.refine_cost(SMALL, 20, keep=True, **given)
    # The sublayer's 72 weights once for the residual, seven times for pulls and iterations, gate
    # and up once for the slopes; the Gram matrix of its inputs.
    assert kept.tf32_products == 2 * (8 * 72 + 48) * 20
    assert (kept.gram_products, kept.fp32_products) == (2 * 16 * 20, 0)
    # Two projections: 16 elements for slopes, 9 for each pull; 5 for the activation.
    assert kept.traffic == 4 * (2 * (16 + 9 * 4) + 5) * 6 * 20
    assert kept.solves == pytest.approx(2 * 9 * 48 * 4 + 64 / 3)
    again = cost.refine_cost(SMALL, 20, keep=False, **given)
    assert again.tf32_products - kept.tf32_products == 2 * 3 * 48 * 20
    assert again.traffic - kept.traffic == 4 * 3 * 16 * 2 * 6 * 20


def test_what_two_digits_of_int8_add() -> None:
    inputs, outputs = 5 * 4 + 4 + 6, 4 + 2 * 2 + 2 * 4 + 2 * 6
    found = cost.int8_cost(SMALL, 20)
    assert found.products == 2 * (32 + 16 + 48 + 24) * 20
    assert found.traffic == 20 * (inputs * 66 + outputs * 36)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "falcon-groups"])
def test_fused_projections_are_counted_once(name: str, tmp_path: Path) -> None:
    spec = tiny_family(tmp_path / "m", name).spec
    weights = [shape for shape in spec.layer_tensors[0].values() if len(shape) == 2]
    widths = layer_widths(spec)
    assert widths.projections == sum(rows * columns for rows, columns in weights)
    assert widths.key == spec.kv_heads * spec.head_dim
