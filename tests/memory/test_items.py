"""Every item of the plan against bytes computed by hand, for Llama-3-8B's shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_shapes import LLAMA_1B, LLAMA_8B, shapes

from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.items import pinned_bytes
from frugal_bonsai.memory.prune_items import PruneItems
from frugal_bonsai.memory.work import Choice, PlanItem, PruneWorkload
from frugal_bonsai.rewrite.cut_stream import PIECE_BYTES
from frugal_bonsai.sizes import GIB, MIB

H, FFN, VOCABULARY = 4096, 14336, 128256
LAYER = 218_112_000  # parameters of one layer, its two norms included
ROWS = 4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096
STORED = LAYER + 4 * ROWS + 2 * 2 * 4096  # int8, fp32 scales, norms in bf16

CUDA = Budget(device="cuda", host_bytes=64 * GIB, gpu_bytes=24 * GIB)
CPU = Budget(device="cpu", host_bytes=64 * GIB)
WORK = PruneWorkload(
    window=2048,
    windows=32,
    weights="int8",
    source_bytes=2,
    goals=(0.49,),
    part_windows=32,
    reconstruction=True,
    refit_inputs=True,
)
CHOICE = Choice(micro_batch=3, in_flight=20, resident=5, keep_inputs=True)


def near(work: PruneWorkload = WORK) -> PruneItems:
    return PruneItems(LLAMA_8B, CUDA, work)


def far(work: PruneWorkload = WORK) -> PruneItems:
    return PruneItems(LLAMA_8B, CPU, work)


def sizes(items: list[PlanItem]) -> dict[tuple[str, str], int]:
    return {(item.name, item.where): item.size_bytes for item in items}


def test_the_source_is_bf16_and_the_layer_as_expected() -> None:
    assert near().layer_parameters == LAYER
    assert near().stored_bytes("int8") == STORED
    assert near().stored_bytes("native") == near().stored_bytes(None) == 2 * LAYER


@pytest.mark.parametrize(
    ("size", "taken"), [(1, 1), (2, 2), (3, 4), (2**28, 2**28), (2**28 + 1, 2**29)]
)
def test_pinned_blocks_are_powers_of_two(size: int, taken: int) -> None:
    assert pinned_bytes(size) == taken


def test_layer_buffers() -> None:
    on_gpu = sizes(near().stream(CHOICE, "int8"))
    assert on_gpu["layer buffers", "host"] == 2 * 2**28
    assert on_gpu["layer buffers", "gpu"] == 2 * STORED
    assert on_gpu["dequantised layer", "gpu"] == 2 * LAYER
    on_cpu = sizes(far().paired_streams(CHOICE, "int8"))
    assert on_cpu["layer buffers", "host"] == 4 * STORED
    assert on_cpu["dequantised layer", "host"] == 2 * 4 * LAYER


def test_a_cpu_dequantises_some_rows_at_a_time() -> None:
    """256 rows of down_proj and their products with 256 tokens; the layer's two norms."""
    items = sizes(far().stream(CHOICE, "int8"))
    assert items["layer buffers", "host"] == 2 * STORED
    block = 256 * FFN * 4 + 256 * 256 * 4
    assert items["dequantised rows", "host"] == block + 2 * H * 4
    assert ("dequantised layer", "host") not in items
    assert far().scored_weight().size_bytes == H * FFN * 4
    assert near().scored_weight().size_bytes == 0, "a GPU has the dense layer's"


def test_a_layer_of_small_weights_is_dequantised_whole() -> None:
    items = PruneItems(shapes(2, 256, 768, 4096, 2, head_dim=64), CPU, WORK)
    size = 4 * items.layer_parameters
    assert sizes(items.stream(CHOICE, "int8"))["dequantised layer", "host"] == size
    assert items.scored_weight().size_bytes == 0


def test_one_buffer_reads_nothing_ahead() -> None:
    choice = replace(CHOICE, buffers=1)
    assert sizes(far().stream(choice, "int8"))["layer buffers", "host"] == STORED
    rows = 2**25 // (H * 4)
    assert sizes(far().head_rows(choice))["head chunks", "host"] == rows * H * 2


def test_a_layer_in_the_compute_dtype_is_used_where_it_lies() -> None:
    assert ("dequantised layer", "gpu") not in sizes(near().stream(CHOICE, None))
    assert ("dequantised rows", "host") in sizes(far().stream(CHOICE, None))


def test_int8_products_dequantise_nothing() -> None:
    items = sizes(far().stream(CHOICE, "int8", products=True))
    assert ("dequantised layer", "host") not in items
    assert items["int8 products", "host"] == 256 * (8 * 14336 + 10 * 14336) + H * FFN


def test_hidden_states() -> None:
    window = 2048 * H * 2  # 16 MiB, a power of two
    items = sizes(near().hidden(CHOICE, 20, states=3))
    assert items["hidden states on the device", "gpu"] == 3 * 5 * window
    assert items["micro-batches on their way", "gpu"] == 3 * 3 * 3 * window
    assert items["hidden states", "host"] == 3 * 15 * window
    assert sizes(near().hidden(CHOICE, 4)) == {("hidden states on the device", "gpu"): 4 * window}
    assert sizes(far().hidden(CHOICE, 20)) == {("hidden states", "host"): 20 * 2048 * H * 4}


def test_activations() -> None:
    token = 2 * H + 3 * FFN
    assert near().activations(CHOICE, 20).size_bytes == 3 * 2048 * token * 2
    assert far().activations(CHOICE, 2).size_bytes == 2 * 2048 * token * 4
    assert near().tapped_activations(CHOICE).size_bytes == 3 * 2048 * (token + 4096) * 2
    assert near().paired_activations(CHOICE).size_bytes == 3 * 2048 * (token + 2 * H) * 2


def test_int8_products_take_few_tokens_on_a_cpu() -> None:
    work = replace(WORK, window=64)
    # 8 MiB of the FFN's channels are 146 tokens, fewer than the 256 that a product takes.
    assert far(work).with_products(CHOICE) == CHOICE
    assert far(work).with_products(replace(CHOICE, micro_batch=50)).micro_batch == 256 // 64
    assert far().with_products(CHOICE).micro_batch == 1
    assert near(work).with_products(replace(CHOICE, micro_batch=50)).micro_batch == 50


def test_head() -> None:
    rows = 2**25 // (H * 2)
    tokens = 2048  # of the 2,048 that fit into 32 MiB of logits, whole windows
    assert near().head_sizes(CHOICE) == (rows, tokens)
    items = sizes(near().head_rows(CHOICE))
    assert items == {
        ("head chunks", "host"): 2 * rows * H * 2,
        ("head chunks", "gpu"): 2 * rows * H * 2,
    }
    assert near().logits(CHOICE).size_bytes == tokens * rows * 6 + tokens * H * 2
    rows = 2**25 // (H * 4)
    items = sizes(far().head_rows(CHOICE))
    assert items["head chunks", "host"] == 2 * rows * H * 2
    assert items["head chunk in the compute dtype", "host"] == 256 * (H + 256) * 4
    assert far().logits(CHOICE).size_bytes == 4096 * rows * 4 + 4096 * H * 4
    items = sizes(far().head_rows(CHOICE, products=True))
    assert items["head chunks", "host"] == 2 * rows * (H + 4)
    assert items["int8 products", "host"] == 256 * (8 * rows + 10 * H) + rows * H
    blocks = 2**23 // (4 * rows)  # 8 MiB of logits
    found = far().logits(CHOICE, products=True)
    assert found.size_bytes == blocks * rows * 4 + 4096 * H * 4
    assert near().logits(CHOICE, products=True) == near().logits(CHOICE)


def test_a_custom_utility_needs_all_logits() -> None:
    items = near(replace(WORK, full_logits=True))
    assert items.head_sizes(CHOICE) == (VOCABULARY, 2048)
    kept = items.kept_head(CHOICE)
    assert kept is not None and kept.size_bytes == VOCABULARY * H * 2
    assert near().kept_head(CHOICE) is None
    assert items.all_logits().size_bytes == 2 * 2048 * VOCABULARY * 4


def test_gram_matrices() -> None:
    assert near().gram().size_bytes == 4 * (4096**2 + FFN**2)
    assert near().gram_of_reconstruction().size_bytes == 4 * (FFN**2 + FFN * H)
    assert near().solve().size_bytes == 4 * FFN * (256 + 6 * 1024)
    assert far().solve().size_bytes == 4 * FFN * (256 + 6 * 128)
    narrow = PruneItems(LLAMA_1B, CPU, replace(WORK, refit_inputs=False))
    assert narrow.gram_of_reconstruction().size_bytes == 4 * (8192**2 + 8192 * 2048)


def test_recovery_holds_inputs_and_refits() -> None:
    assert near().kept_inputs(32).size_bytes == 32 * 2048 * (4096 + FFN) * 2
    assert far().refits().size_bytes == 2 * H * FFN  # converted from fp32 as it is written
    assert near().refits().size_bytes == 0  # computed with and saved in bf16


def test_refinement() -> None:
    work = replace(WORK, channel_updates=2)
    block = FFN // 4
    # gate, up and the refit of down_proj before; in fp32 where the dense layer's are.
    (weights,) = near(work).updated_weights()
    assert weights.size_bytes == 3 * FFN * H * 4
    assert far(work).updated_weights() == []
    size = 4 * (8 * 2 * block * H + H**2 + block**2)
    assert near(work).updated_block().size_bytes == size
    # 16 of 32 windows in a step, two projections, fp32.
    assert near(work).slopes(32).size_bytes == 16 * 2048 * 2 * block * 4
    # The curvature takes 64 tokens a row: 224 of 400 windows.
    assert near(work).slopes(800).size_bytes == 224 * 2048 * 2 * block * 4
    token = 3 * H + (3 * 2 + 4) * block
    own = 2 * H + 3 * FFN + 2 * H
    assert far(work).update_activations(CHOICE).size_bytes == 3 * 2048 * own * 4
    one = replace(CHOICE, micro_batch=1)
    assert near(work).update_activations(one).size_bytes == 2048 * token * 4
    assert near(work).kept_inputs(32, ffn=False).size_bytes == 32 * 2048 * 4096 * 2
    # Blocks are a quarter of the channels, but at least 512.
    assert PruneItems(LLAMA_1B, CPU, work).updated_block().size_bytes == 4 * (
        8 * 2 * 2048 * 2048 + 2 * 2048**2
    )


def test_stand_ins() -> None:
    work = replace(WORK, imputation_pool=0.5)  # of a half
    pool, core = FFN // 4, FFN - FFN // 4
    assert near(work).imputation()[0].size_bytes == pool * core * 2
    assert far(work).imputation()[0].size_bytes == pool * core * 4
    made = 8 * pool**2 + 2 * pool * core + 4 * 256 * (2 * FFN + 3 * pool)
    assert far(work).solve(share=0.25).size_bytes == made
    # As read, the next group's as read, and one that is being pinned; in powers of two.
    on_host = near(work).imputation()[1]
    assert on_host.where == "host"
    assert on_host.size_bytes == 3 * pinned_bytes(2 * pool * core)
    assert len(far(work).imputation()) == 1
    assert near(work).solve(share=0.01) == near(work).solve()
    # Up to half of a group there is room beside what a layer holds at its peak.
    plain, masked = near().activations(CHOICE, 20), near(work).masked_activations(CHOICE, 20)
    assert masked.size_bytes == plain.size_bytes
    # Small micro-batches have none for stand-ins that are being converted.
    few = near(replace(work, window=128)).masked_activations(replace(CHOICE, micro_batch=1), 20)
    assert few.size_bytes == 128 * (2 * H + FFN) * 2 + 2 * pool * core
    most = near(replace(WORK, imputation_pool=2.0)).masked_activations(CHOICE, 20)
    assert most.size_bytes == plain.size_bytes + 3 * 2048 * FFN * 2
    assert near(replace(WORK, imputation_pool=1.8)).imputation()[0].size_bytes == FFN**2 // 4 * 2


def test_files() -> None:
    (alone,) = far().building()
    host, tensor, rows = near().building()
    assert alone.size_bytes == host.size_bytes == H * FFN * (2 * 2 - 1) + STORED
    assert (tensor.where, tensor.size_bytes) == ("gpu", H * FFN * (2 + 1))
    assert (rows.where, rows.size_bytes) == ("gpu", 4 * 8 * MIB)
    assert near().rewriting(refitted=True).size_bytes == 2 * H * FFN * 2
    alone = near().rewriting()
    assert alone.size_bytes == 4 * PIECE_BYTES


def test_verification() -> None:
    token = 2 * H + 3 * FFN + 3 * H
    assert near().verified_activations().size_bytes == 2 * 64 * token * 2
    exact = near().in_fp32()
    assert exact.verified_activations().size_bytes == 2 * 64 * token * 4
    assert exact.head_sizes(CHOICE) == near().head_sizes(CHOICE)
    dense = [item for item in exact.stream(CHOICE, None) if item.name == "dequantised layer"]
    assert [item.size_bytes for item in dense] == [4 * near().layer_parameters]
    assert near().stream(CHOICE, None)[-1].name == "layer buffers"
    assert near().verified_logits().size_bytes == 3 * 64 * VOCABULARY * 4
